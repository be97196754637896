"""Stock transformers models, made resumable, and their weights."""

import os

# cuBLAS promises the same bits twice only with workspaces of a fixed size. Torch reads this once,
# when it first multiplies on a GPU, so it is set before anything here imports torch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
