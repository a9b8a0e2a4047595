"""The lines of the guide that fake a caller in tests."""

import re

import pytest

from tests.conftest import Api
from tests.docs.test_adding_a_resource import GUIDE

TASKS = "/api/v1/tasks"


async def test_the_recipe_of_the_guide_fakes_a_caller(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = re.findall(
        r"^```python\n(.*?dependency_overrides.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    monkeypatch.setattr(api.app, "dependency_overrides", {})
    exec(recipe, {"app": api.app})  # noqa: S102  # the lines of the guide
    created = await api.http.post(TASKS, json={"title": "faked"})
    assert created.status_code == 201, created.text
    assert created.json() in (await api.http.get(TASKS)).json()["items"]
    assert (await api.http.get("/api/v1/users/me")).json()["subject"] == "ada"
    assert (await api.http.get("/api/v1/admin/users")).status_code == 200
