"""Adapters to FastAPI, Starlette and uvicorn: server, dispatch, request bodies, errors, limits and OpenAPI."""
