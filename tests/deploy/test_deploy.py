"""The files of deploy/: valid, their commands understood by the programs, and the composition run here as processes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import typer
import yaml

from flashmoe.cli import make_app
from tests.server.gateway import free_ports, gateway
from tests.server.process import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
KEY = "of all workers"
UNIT = (DEPLOY / "flashmoe.service").read_text()


def containers() -> Iterator[dict[str, Any]]:
    for document in KUBERNETES:
        pod = document["spec"]["template"]["spec"] if "template" in document.get("spec", {}) else {}
        yield from pod.get("initContainers", [])
        yield from pod.get("containers", [])


def serve_commands() -> dict[str, list[str]]:
    """What follows `flashmoe` in each file."""
    found = {"compose": COMPOSE["services"]["worker-1"]["command"]}
    found |= {c["name"]: c["command"][1:] for c in containers() if c["command"][0] == "flashmoe"}
    found["systemd"] = shlex.split(re.findall(r"^ExecStart=\S+/flashmoe (.*)$", UNIT, re.M)[0])
    return found


@pytest.mark.parametrize("where", ["compose", "worker", "systemd"])
def test_commands_of_workers(where: str) -> None:
    """Our own command line takes them, and supervisors wait for longer than the server drains."""
    verb, *arguments = serve_commands()[where]
    command = typer.main.get_command(make_app()).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, list(arguments)).params
    waits = {
        "compose": COMPOSE["services"]["worker-1"]["stop_grace_period"],
        "worker": f"{KUBERNETES[2]['spec']['template']['spec']['terminationGracePeriodSeconds']}s",
        "systemd": f"{re.findall(r'^TimeoutStopSec=(.*)$', UNIT, re.M)[0]}s",
    }
    assert int(waits[where].removesuffix("s")) >= given["drain_seconds"] + 30
    assert given["save_cache"]


def test_commands_of_gateways() -> None:
    pytest.importorskip("smg", reason="smg is not installed")
    from smg.router_args import RouterArgs

    parser = ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    found = [COMPOSE["services"]["gateway"]["command"]]
    found += [c["command"][3:] for c in containers() if "smg" in c["command"]]
    assert len(found) == 2
    for verb, *arguments in found:
        assert verb == "launch"
        assert parser.parse_args(arguments).policy == "cache_aware"


def test_image() -> None:
    """What it installs is what is tested here."""
    steps = (DEPLOY / "Dockerfile").read_text()
    pinned = (DEPLOY.parent / "constraints.txt").read_text().split()
    wanted = re.findall(r"smg==[\d.]+", steps)
    assert wanted
    assert set(wanted) <= set(pinned)
    assert "/src[serve]" in steps


def test_kubernetes() -> None:
    """Against the schema of the API, in which an unknown field is an error; and what refers to what."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    ).validate
    for document in KUBERNETES:
        validate(document, "1.32", strict=True)
    broken = {**KUBERNETES[1], "spec": {**KUBERNETES[1]["spec"], "selectors": {}}}
    with pytest.raises(Exception, match="selectors"):
        validate(broken, "1.32", strict=True)
    stateful = next(d for d in KUBERNETES if d["kind"] == "StatefulSet")
    assert stateful["spec"]["serviceName"] in {
        d["metadata"]["name"] for d in KUBERNETES if d["kind"] == "Service"
    }
    for document in KUBERNETES:
        if "template" in (spec := document.get("spec", {})):
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
            volumes = {v["name"] for v in spec["template"]["spec"]["volumes"]}
            volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
            for container in spec["template"]["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    liveness = stateful["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 60  # --drain-seconds


def test_systemd(tmp_path: Path) -> None:
    """The system's own checker takes the unit, with a program that is there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    unit = tmp_path / "flashmoe.service"
    unit.write_text(UNIT.replace("/opt/flashmoe/bin/flashmoe", shutil.which("true") or ""))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("MemoryMax=8G", "MemoryMost=8G"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert "MemoryMost" in done.stderr


def test_composition(demo: Path) -> None:
    """The services' own commands as processes of this machine, with a key as in Kubernetes: a chat through the gateway,
    and an end in order."""
    pytest.importorskip("smg", reason="smg is not installed")
    services = COMPOSE["services"]
    command = services["gateway"]["command"]
    urls = [argument for argument in command if argument.startswith("http://")]
    assert urls == [f"http://{name}:8080" for name in services if name.startswith("worker")]
    ports = free_ports(len(urls))
    workers = []
    try:
        for port in ports:
            arguments = serve_commands()["compose"][2:]
            options = [a for a in arguments if not a.startswith(("--host", "--port"))]
            environment = {"FLASHMOE_API_KEY": KEY}
            workers.append(ServerProcess(demo, *options, "--port", port, "--ram", "600MiB", env=environment))
        options = [
            a for a in command[1:] if a.startswith("--") and not re.match("--(host|port|worker-urls)", a)
        ]
        options += ["--api-key", KEY]
        with (
            gateway([worker.url for worker in workers], options, KEY) as url,
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client,
        ):
            body = {
                "model": "flashmoe",
                "messages": [{"role": "user", "content": "A colour?"}],
                "max_tokens": 4,
            }
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
            assert httpx.get(f"{url}/health").status_code == 200
            assert client.get("/v1/models").json()["data"][0]["id"] == "flashmoe"
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
            assert streamed.text.count("data: ") > 4
            assert streamed.text.rstrip().endswith("data: [DONE]")
    finally:
        statuses = [worker.stop() for worker in workers]
    assert statuses == [0, 0]
