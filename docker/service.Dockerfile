# The memory service. Build from the repository root: docker build -f docker/service.Dockerfile -t kvbank-service .
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip wheel --wheel-dir /wheels -c constraints.txt "$(ls /wheels/kvbank-*.whl)[server]"

FROM python:3.11-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels "kvbank[server]" && rm -rf /wheels \
    && useradd --create-home --uid 10001 kvbank && install -d -o kvbank /data
USER kvbank
VOLUME /data
EXPOSE 7400
HEALTHCHECK --interval=10s --timeout=5s CMD ["kvbank", "ping", "127.0.0.1:7400"]
# There is no authentication yet: publish the port to a network you trust, or not at all.
ENTRYPOINT ["kvbank", "serve", "--data", "/data", "--listen", "0.0.0.0:7400", "--insecure"]
