# The GPU set-up in a container:  docker build -t deepseek-sft .   then
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /nfs:/nfs deepseek-sft python -m src.cli plan --config ...
# A driver for CUDA 13 (580 or later) is the host's. Build on a machine with the processors of the nodes: DeepSpeed's
# optimizer is compiled for them.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev g++ git pdsh \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/deepseek-sft
COPY . .
ENV TORCH_EXTENSIONS_DIR=/opt/deepseek-sft/torch_extensions
RUN PYTHON=python3.12 bash scripts/setup.sh --gpu
ENV PATH=/opt/deepseek-sft/.venv/bin:$PATH VIRTUAL_ENV=/opt/deepseek-sft/.venv
