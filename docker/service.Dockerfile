# The memory service. Build from the repository root: docker build -f docker/service.Dockerfile -t kvbank-service .
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip wheel --wheel-dir /wheels -c constraints.txt "$(ls /wheels/kvbank-*.whl)[server,postgres,s3]"

FROM python:3.11-slim
COPY --from=build /wheels /wheels
COPY docker/secure/setup.sh /usr/local/bin/kvbank-setup
COPY docker/scale/secrets.sh /usr/local/bin/kvbank-scale-secrets
COPY docker/scale/store.sh /usr/local/bin/kvbank-scale-store
COPY docker/scale/keys.sh /usr/local/bin/kvbank-scale-keys
# The folders are those where docker/compose.yaml and docker/scale/compose.yaml have volumes, which take their owner from
# here; the last ones are read by programs of other images.
RUN pip install --no-cache-dir --no-index --find-links /wheels "kvbank[server,postgres,s3]" && rm -rf /wheels \
    && useradd --create-home --uid 10001 kvbank \
    && install -d -m 0700 -o kvbank /data /audit /cache /secrets \
    && install -d -m 0700 -o kvbank /secrets/authority /secrets/service /secrets/operator /secrets/worker-1 /secrets/worker-2 \
    && install -d -m 0700 -o kvbank /secrets/store /secrets/owner \
    && install -d -m 0755 -o kvbank /secrets/database /secrets/bucket /secrets/grafana /secrets/balancer /secrets/watching
USER kvbank
VOLUME /data
EXPOSE 7400 9400
ENV KVBANK_METRICS_LISTEN=0.0.0.0:9400
# Health is told without a key. This asks from inside, where nobody else can answer, so it takes any certificate.
HEALTHCHECK --interval=10s --timeout=5s CMD ["python", "-c", "import ssl, urllib.request as web; web.urlopen('https://localhost:9400/readyz', context=ssl._create_unverified_context())"]
# It starts with a certificate alone (KVBANK_TLS_CERT, KVBANK_TLS_KEY), and answers callers with keys alone.
ENTRYPOINT ["kvbank", "serve", "--data", "/data", "--listen", "0.0.0.0:7400"]
