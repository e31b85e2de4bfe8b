import os

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its processes, which have no terminal
