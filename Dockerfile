# Trains on a GPU where the container is given one, else on the CPU:
#
#     docker build -t cql .
#     docker run --rm cql                                     # the quickstart
#     docker run --rm --gpus all -v cql-data:/home/cql/.minari -v cql-runs:/app/runs \
#         cql python cql.py --config_path configs/hopper.yaml
#
# A slim Python base, because torch's wheels for Linux on PyPI bring their own CUDA (13.0
# for torch 2.13): a CUDA or PyTorch base would hold a second one, and tie the
# torch version to an image tag instead of requirements.txt. The host needs an NVIDIA
# driver for CUDA 13 and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm

# g++ is for torch.compile. The other packages render MuJoCo off-screen: EGL, on the GPU
# or in software, or MUJOCO_GL=osmesa.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=egl \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 cql \
    && install -d -o cql -g cql /app /app/runs /home/cql/.minari
WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt

USER 1000
COPY --chown=cql:cql . .
CMD ["python", "cql.py", "--config_path", "configs/quickstart.yaml"]
