# syntax=docker/dockerfile:1
# Two images, by --target: `issuer`, the reference Better Auth for trying things out, and `api` (the last, so the default).

FROM node:22-bookworm-slim AS issuer
WORKDIR /issuer
COPY frontend-contract .
# Of the workspace, only what the server runs on.
RUN npm ci --ignore-scripts --omit=dev --workspace=@frontend-contract/better-auth \
 && npm cache clean --force \
 && install --directory --owner=node --group=node /data
ENV NODE_ENV=production ISSUER_HOST=0.0.0.0 ISSUER_DATA_DIR=/data
USER 1000:1000
VOLUME /data
EXPOSE 3000
HEALTHCHECK --start-period=30s --start-interval=1s --interval=10s --timeout=3s \
  CMD ["node", "-e", "fetch('http://127.0.0.1:3000').then(({ ok }) => process.exit(ok ? 0 : 1), () => process.exit(1))"]
CMD ["node", "--experimental-strip-types", "--disable-warning=ExperimentalWarning", "better-auth/server.ts"]

FROM python:3.13-slim-bookworm AS build
WORKDIR /app
COPY requirements/runtime.txt .
# Each package by its hash, from a wheel: nothing is compiled, and nothing of a package runs while it is installed.
RUN python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir --no-deps --require-hashes --only-binary=:all: -r runtime.txt
COPY backend backend
RUN /venv/bin/python -m compileall -q --invalidation-mode unchecked-hash backend

FROM python:3.13-slim-bookworm AS api
COPY --from=build /venv /venv
COPY --from=build /app/backend /app/backend
WORKDIR /app
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# By number, so that an orchestrator can see that it is not root. It writes to /tmp alone, and only with several workers.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Whatever answers lives: TRUSTED_HOSTS may refuse this host, with a 400.
HEALTHCHECK --start-period=30s --start-interval=1s --interval=10s --timeout=3s \
  CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=2); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status >= 500)"]
ENTRYPOINT ["python", "-m", "backend.cli"]
CMD ["serve", "--host", "0.0.0.0"]
