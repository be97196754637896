"""The bundled model: a small Llama, trained from scratch, with abilities worth debugging.

Decides where its folder lies. How it is loaded is left to the loader of any other model; its
text, training and evaluation live in the modules beside this one and are not needed to run it.
"""

from pathlib import Path

__all__ = ["weights_folder"]


def weights_folder() -> Path:
    """Give the folder of the bundled model: an ordinary Hugging Face folder.

    Example:
        >>> (weights_folder() / "config.json").name
        'config.json'
    """
    return Path(__file__).parent / "weights"
