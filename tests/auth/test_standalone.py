"""`backend.auth` as a package of its own: copied under another name, its imports, exports and test issuer."""

import ast
import importlib
import json
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import jwt
import pytest
import respx

import backend.auth
from backend.auth import RemoteKeys, parse_jws, verify_jws
from backend.auth.testing import ALGORITHMS, LocalIssuer, SigningKey

FOLDER = Path(backend.auth.__file__).parent
ALLOWED = {"fastapi", "starlette", "httpx", "jwt", "cryptography", "cachetools", "pydantic"}

PROGRAM = """
import asyncio
from contextlib import asynccontextmanager
import httpx
from fastapi import APIRouter, FastAPI
from vendored.lifted import Bearer, BearerRoute, CurrentPrincipal, RemoteKeys, TokenVerifier
from vendored.lifted.testing import LocalIssuer

issuer = LocalIssuer()

@asynccontextmanager
async def lifespan(app):
    async with httpx.AsyncClient(transport=issuer.transport()) as client:
        async with RemoteKeys(issuer.jwks_url, client=client) as keys:
            verifier = TokenVerifier(keys=keys, issuers=[issuer.url], audiences=[issuer.audience])
            yield {"bearer": Bearer(verifier)}

router = APIRouter(route_class=BearerRoute)

@router.get("/me")
async def me(principal: CurrentPrincipal) -> dict[str, str]:
    return {"subject": principal.subject}

app = FastAPI(lifespan=lifespan)
app.include_router(router)

async def main():
    async with app.router.lifespan_context(app) as state:
        async def with_state(scope, receive, send):
            await app({**scope, "state": dict(state)}, receive, send)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://api") as http:
            print((await http.get("/me")).status_code)
            response = await http.get("/me", headers={"Authorization": f"Bearer {issuer.token('ada')}"})
            print(response.status_code, response.json()["subject"])

asyncio.run(main())
import sys
print(any(name == "backend" or name.startswith("backend.") for name in sys.modules))
"""


def test_a_copy_under_another_name_authenticates(tmp_path: Path) -> None:
    (tmp_path / "vendored").mkdir()
    shutil.copytree(FOLDER, tmp_path / "vendored" / "lifted", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:3] == ["401", "200 ada", "False"]


def test_the_package_imports_no_other_module_of_the_project() -> None:
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name} reaches outside its folder"
                modules = [node.module] if node.level == 0 and node.module else []
            else:
                continue
            for module in modules:
                root = module.partition(".")[0]
                assert root in ALLOWED or root in sys.stdlib_module_names, f"{file.name} imports {module}"


def test_all_lists_every_public_name() -> None:
    names = {
        name
        for name, value in vars(backend.auth).items()
        if not name.startswith("_") and getattr(value, "__name__", "") != f"backend.auth.{name}"
    }
    assert names == set(backend.auth.__all__)
    assert len(set(backend.auth.__all__)) == len(backend.auth.__all__)


def test_modules_have_no_mutable_state() -> None:
    """Apps in one process cannot affect each other."""
    for module in pkgutil.iter_modules([str(FOLDER)]):
        for name, value in vars(importlib.import_module(f"backend.auth.{module.name}")).items():
            if not name.startswith("__"):
                assert not isinstance(value, (list, set, dict, bytearray)), (module.name, name)


def test_the_example_in_the_readme_runs(tmp_path: Path) -> None:
    readme = (FOLDER / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "lifespan" in block)
    (tmp_path / "example.py").write_text(example)
    app = runpy.run_path(str(tmp_path / "example.py"))["app"]
    assert app.openapi()["paths"]["/me"]["get"]["security"] == [{"BetterAuth": []}]


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_the_local_issuer_signs_like_better_auth(issuers: dict[str, LocalIssuer], alg: str) -> None:
    issuer = issuers[alg]
    members = {
        "EdDSA": {"alg", "crv", "x", "kty", "kid"},
        "ES256": {"alg", "crv", "kty", "x", "y", "kid"},
        "ES512": {"alg", "crv", "kty", "x", "y", "kid"},
        "RS256": {"alg", "e", "kty", "n", "kid"},
        "PS256": {"alg", "e", "kty", "n", "kid"},
    }
    assert set(issuer.key.jwk) == members[alg]
    assert re.fullmatch("[A-Za-z0-9]{32}", issuer.key.kid)
    token = issuer.token("ada")
    assert jwt.get_unverified_header(token) == {"alg": alg, "kid": issuer.key.kid}
    claims = jwt.decode(token, options={"verify_signature": False})
    assert set(claims) == {
        *("iat", "name", "email", "emailVerified", "image", "createdAt", "updatedAt", "id", "sub", "exp", "iss", "aud")
    }
    assert claims["exp"] - claims["iat"] == 900
    access = issuer.access_token("ada")
    assert jwt.get_unverified_header(access)["typ"] == "at+jwt"


def test_the_local_issuer_signs_security_events(issuer: LocalIssuer) -> None:
    token = issuer.security_event("ada", "urn:first", {"urn:second": {"n": 1}}, toe=5, omit=["jti"])
    assert parse_jws(token).typ == "secevent+jwt"
    claims = json.loads(verify_jws(token, issuer.jwks))
    assert claims["aud"] == f"{issuer.audience}/api/v1/security-events"
    assert claims["sub_id"] == {"format": "iss_sub", "iss": issuer.url, "sub": "ada"}
    assert (claims["toe"], claims["events"]) == (5, {"urn:first": {}, "urn:second": {"n": 1}})
    assert "jti" not in claims


async def test_the_local_issuer_rotates_and_publishes_its_keys(issuer: LocalIssuer) -> None:
    old = issuer.key
    new = issuer.rotate("ES256", kid="new")
    assert issuer.jwks["keys"] == [old.jwk, new.jwk]
    assert issuer.rotate(keep=False).alg == "ES256"
    assert len(issuer.jwks["keys"]) == 1
    async with httpx.AsyncClient(transport=issuer.transport()) as client:
        assert (await client.get(issuer.jwks_url)).json() == issuer.jwks
        assert (await client.get(f"{issuer.url}/jwks")).status_code == 404
    with pytest.raises(ValueError, match="EdDSA"):
        SigningKey.generate("HS256", "k")


async def test_http_can_be_mocked_with_respx(issuer: LocalIssuer) -> None:
    """Tests of other apps need no server: any mock of the JWKS URL works."""
    with respx.mock(assert_all_called=True) as router:
        router.get(issuer.jwks_url).respond(json=issuer.jwks)
        async with RemoteKeys(issuer.jwks_url) as keys:
            assert (await issuer.verifier(keys).verify(issuer.token("ada"))).subject == "ada"
        assert router.calls.call_count == 1
