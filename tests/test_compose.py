"""infra/mlflow/docker-compose.yaml against a schema of those keys of the Compose Specification that it uses.

No engine is needed. The file is also valid under the full schema (compose-spec.json of 2024, tried by hand).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FILE = Path(__file__).parents[1] / "infra" / "mlflow" / "docker-compose.yaml"
TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}
DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}


def closed(required: list[str], /, **properties: Any) -> dict[str, Any]:
    """Schema of a mapping with these keys and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def named(schema: Any) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {"^[a-zA-Z0-9._-]+$": schema}, "additionalProperties": False}


SERVICE = closed(
    [],
    image={"type": "string", "pattern": r"^[\w./-]+:[\w.-]*\d[\w.-]*$"},  # with a version, never the newest
    build=closed(["context"], context=TEXT, dockerfile_inline=TEXT),
    depends_on=named(
        closed(
            ["condition"],
            condition={"enum": ["service_started", "service_healthy", "service_completed_successfully"]},
        )
    ),
    environment=named({"type": ["string", "number", "boolean", "null"]}),
    env_file={"type": "array", "items": closed(["path"], path=TEXT, required={"type": "boolean"})},
    secrets=TEXTS,
    configs={"type": "array", "items": closed(["source"], source=TEXT, target=TEXT)},
    entrypoint=TEXTS,
    command=TEXTS,
    ports={"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
    volumes={"type": "array", "items": {"type": "string", "pattern": r"^\w+:/[\w./-]+$"}},
    healthcheck=closed(["test"], test=TEXTS, interval=DURATION, timeout=DURATION, retries={"type": "integer"}),
    restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
)
COMPOSE = closed(
    ["services"],
    name={"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
    services=named(SERVICE),
    configs=named(closed([], content=TEXT, file=TEXT)),
    secrets=named(closed(["file"], file=TEXT)),
    volumes=named({"type": ["null", "object"]}),
)


def test_the_compose_file_is_valid() -> None:
    compose = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    jsonschema.validate(compose, COMPOSE)
    for name, service in compose["services"].items():
        for kind in ("secrets", "configs", "depends_on"):
            defined = compose["services"] if kind == "depends_on" else compose[kind]
            for each in service.get(kind, ()):
                assert (each["source"] if isinstance(each, dict) else each) in defined, f"{name}: {kind} {each}"
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"], f"{name}: volume {volume}"
        assert "image" in service or "build" in service


def test_it_contains_no_password_and_only_known_variables() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"PASSWORD: *\S|://\w+:[^/\s]+@", text)
    filled = re.findall(
        r"(?<!\$)\$\{?(\w+)", text
    )  # Compose replaces these from its environment; $$ is left to the shell
    assert set(filled) <= {"MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_ARTIFACTS", "MLFLOW_S3_ENDPOINT_URL"}
    for script in ("server.sh", "docker-compose.yaml"):
        text = (FILE.parent / script).read_text(encoding="utf-8")
        assert "-ge 12" in text and "basic-auth" in text
