# The image of backprop, with a GPU or without:
#   docker build --target gpu -t backprop:gpu .
#   docker build --target cpu -t backprop:cpu --build-arg BASE_IMAGE=debian:12-slim --build-arg RUNTIME_IMAGE=debian:12-slim .
# Both bases must be the same release of Debian or Ubuntu, since Python comes from its packages. llama.cpp is built for CUDA
# where BASE_IMAGE has a compiler for it.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG RUNTIME_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG VERSION=0.1.0

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates g++ python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/venv
WORKDIR /build

# Libraries, converter, programs and bindings of one release. Each instruction set is a file of its own, and so is CUDA: the
# machine that runs them chooses. NCCL is left out, which NVIDIA's base has and others lack: CUDA would not load without it.
FROM build AS llama
ARG CUDA_ARCHITECTURES
ENV BACKPROP_LLAMA_CPP=/opt/llama.cpp
COPY backprop/edges/__init__.py backprop/edges/llama_cpp_build.py backprop/edges/places.py backprop/edges/
RUN nvcc=$(command -v nvcc || find /usr/local/cuda/bin -name nvcc 2>/dev/null || true) \
  && export CMAKE_ARGS="-DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON" \
  && if [ -n "$nvcc" ]; then CMAKE_ARGS="$CMAKE_ARGS -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_COMPILER=$nvcc"; fi \
  && if [ -n "$CUDA_ARCHITECTURES" ]; then CMAKE_ARGS="$CMAKE_ARGS -DCMAKE_CUDA_ARCHITECTURES=$CUDA_ARCHITECTURES"; fi \
  && /opt/venv/bin/python -m backprop.edges.llama_cpp_build server \
  && mkdir /opt/bindings && mv /opt/venv/lib/python3*/site-packages/llama_cpp* /opt/bindings/

FROM build AS packages
COPY requirements.lock scripts/install-locked ./
# Beside what the lock names: llama.cpp's bindings and this project, which have layers of their own.
RUN printf '/opt/bindings\n/opt/app\n' >layers.pth && cp layers.pth /opt/venv/lib/python3*/site-packages/
# Of transformers, which is mostly models, only these and what every start reads are kept as bytecode: what is trained commonly.
ENV MODELS="__init__.py auto bert bloom encoder_decoder llama mistral mixtral ministral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_5 \
gemma gemma2 gemma3 gemma4 phi phi3 smollm3 olmo2 granite gpt2 gpt_neox gpt_oss"

# What only tests, or compilers against these packages, would read is left out.
FROM packages AS packages-cpu
RUN ./install-locked /opt/venv/bin/python cpu requirements.lock \
  && cd /opt/venv/lib/python3*/site-packages \
  && find torch/bin -type f ! -name torch_shm_manager -delete \
  && rm -rf torch/test torch/include pyarrow/include pyarrow/src pyarrow/tests \
  && find networkx numpy pandas sympy -depth -type d -name tests -exec rm -rf {} + \
  && find transformers/models -depth -type d -name __pycache__ -exec rm -rf {} + \
  && (cd transformers/models && /opt/venv/bin/python -m compileall -q $MODELS) \
  && find torch/lib pyarrow -name '*.so*' -type f -exec strip --strip-unneeded {} + \
  && rm -rf pip pip-*.dist-info torch/lib/*_test.so

FROM packages AS packages-gpu
RUN ./install-locked /opt/venv/bin/python gpu requirements.lock \
  && cd /opt/venv/lib/python3*/site-packages \
  && rm -rf torch/test pyarrow/include pyarrow/src pyarrow/tests \
  && find networkx numpy pandas sympy -depth -type d -name tests -exec rm -rf {} + \
  && find bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name '*_cuda13*' -delete \
  && find transformers/models -depth -type d -name __pycache__ -exec rm -rf {} + \
  && (cd transformers/models && /opt/venv/bin/python -m compileall -q $MODELS) \
  && find triton pyarrow -name '*.so*' -type f -exec strip --strip-unneeded {} + \
  && rm -rf pip pip-*.dist-info

FROM build AS app
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN awk '/^[a-zA-Z0-9]/ { keep = /^setuptools==/ } keep' requirements.lock >setuptools.txt \
  && /opt/venv/bin/pip install --quiet --no-deps --require-hashes -r setuptools.txt
COPY backprop backprop
RUN /opt/venv/bin/pip install --quiet --no-deps --no-build-isolation --target /opt/app .

FROM ${RUNTIME_IMAGE} AS runtime
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 tini \
  && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
  # Any user may write where runs and caches go, as in /tmp; a new volume takes this over.
  && mkdir -m 1777 /output /cache /cache/tmp && mkdir /data
ENV PATH=/opt/app/bin:/opt/venv/bin:/opt/llama.cpp/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  BACKPROP_LLAMA_CPP=/opt/llama.cpp LLAMA_CPP_LIB_PATH=/opt/llama.cpp/tools \
  # A user without a name in /etc/passwd is one all the same.
  USER=backprop HOME=/cache TMPDIR=/cache/tmp XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface \
  TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
  PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10m --timeout=2m CMD ["backprop", "doctor"]
ENTRYPOINT ["tini", "--", "backprop"]
CMD ["--help"]
ARG VERSION
ARG REVISION=unknown
LABEL org.opencontainers.image.title="backprop" \
  org.opencontainers.image.description="Fine-tune language models on the GPU you have, and hand over a model that runs" \
  org.opencontainers.image.licenses="MIT" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
WORKDIR /

# Triton compiles its launchers when a run starts.
FROM runtime AS runtime-gpu
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
  && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

# The bill of materials: Python packages by cyclonedx, then llama.cpp, this project and the system's packages. It does not
# look at the source, whose every change would make it anew.
FROM build AS sbom
ARG VERSION
RUN python3 -m venv sbom && sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
COPY scripts/bill-of-materials .
COPY --from=llama /build/backprop backprop
COPY --from=llama /opt/bindings /opt/bindings

FROM sbom AS sbom-cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=runtime /var/lib/dpkg/status /usr/lib/os-release system/
RUN sbom/bin/cyclonedx-py environment --output-file sbom.json /opt/venv/bin/python \
  && python3 bill-of-materials sbom.json system "$VERSION"

FROM sbom AS sbom-gpu
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=runtime-gpu /var/lib/dpkg/status /usr/lib/os-release system/
RUN sbom/bin/cyclonedx-py environment --output-file sbom.json /opt/venv/bin/python \
  && python3 bill-of-materials sbom.json system "$VERSION"

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=llama /opt/llama.cpp /opt/llama.cpp
COPY --from=llama /opt/bindings /opt/bindings
COPY --from=sbom-cpu /build/sbom.json /usr/share/backprop/sbom.json
COPY --from=app /opt/app /opt/app
USER 1000:1000

FROM runtime-gpu AS gpu
COPY --from=packages-gpu /opt/venv /opt/venv
# The CUDA libraries of torch serve llama.cpp too.
RUN find /opt/venv -path '*/nvidia/*/lib' -type d >/etc/ld.so.conf.d/venv.conf && ldconfig
COPY --from=llama /opt/llama.cpp /opt/llama.cpp
COPY --from=llama /opt/bindings /opt/bindings
COPY --from=sbom-gpu /build/sbom.json /usr/share/backprop/sbom.json
COPY --from=app /opt/app /opt/app
USER 1000:1000
