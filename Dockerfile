# The quick start in a container, on a CPU:
#
#     docker build -t fastgen .
#     docker run --rm -v "$PWD/runs:/fastgen/runs" fastgen          # ends with a table; pictures and the export are in runs/
#     docker run --rm -v "$PWD/runs:/fastgen/runs" fastgen fastgen train recipes/digits_dmd2_4step.yaml
#
# For a GPU, build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 and run with --gpus all.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /fastgen
RUN pip install --no-cache-dir torch torchvision --index-url ${TORCH_INDEX}

COPY pyproject.toml README.md LICENSE ./
COPY fastgen fastgen
COPY assets assets
COPY recipes recipes
COPY tools/quickstart.py tools/quickstart.py
RUN pip install --no-cache-dir -e .

CMD ["python", "tools/quickstart.py"]
