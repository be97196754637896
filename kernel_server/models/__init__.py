"""Stock transformers models, made resumable, and their weights."""

import os

# cuBLAS chooses its kernels by the workspace it happens to get: with torch's default one a decode
# of a 13B model gave other bits in about one run of three (H200, torch 2.11). Fixed workspaces
# give the same bits every time. It is read once, when torch first multiplies on a GPU, so it is set
# before anything here imports torch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
