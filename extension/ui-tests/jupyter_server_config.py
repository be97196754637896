"""JupyterLab for Galata: no token, and Galata's own helpers in the page. For nothing else."""

from jupyterlab.galata import configure_jupyter_server

chosen = c.ServerApp.root_dir  # noqa: F821 - Jupyter runs this file with its configuration as `c`
configure_jupyter_server(c)  # noqa: F821
c.ServerApp.root_dir = chosen  # noqa: F821 - the command line names it, and may not twice
