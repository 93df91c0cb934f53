"""`scripts/tpu/slice`, with a fake gcloud that records its arguments."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "tpu" / "slice"

# Fails to train the first PREEMPTIONS times, and then reports the state of the slice.
GCLOUD = """#!/usr/bin/env bash
echo "$@" | tr '\\n' ' ' >> "$CALLS"; echo >> "$CALLS"
case "$*" in
  *"scripts/train.py"*)
    [[ $(grep -c scripts/train.py "$CALLS") -gt ${PREEMPTIONS:-0} ]] || exit ${CODE:-255} ;;
  *describe*) echo "${STATE:-READY}" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, **environment):
        named = {"TPU_NAME": "mine", "ZONE": "there", "BUCKET": "kept", "CALLS": str(calls)}
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path} | named | environment
        done = subprocess.run(
            [SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
        assert all(line.startswith("compute tpus tpu-vm ") for line in lines)
        assert all("--zone=there" in line for line in lines)
        return done, [line.removeprefix("compute tpus tpu-vm ") for line in lines]

    return run


def verbs(calls):
    return ["train" if "scripts/train.py" in call else call.split()[0] for call in calls]


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v5litepod-4", "tpu-vm-tf-2.20.0-pjrt"), ("v5litepod-16", "tpu-vm-tf-2.20.0-pod-pjrt")],
)
def test_create(run, accelerator, version):
    done, (call,) = run("create", ACCELERATOR_TYPE=accelerator)
    assert done.returncode == 0
    assert call.split()[:2] == ["create", "mine"]
    assert {f"--accelerator-type={accelerator}", f"--version={version}", "--spot"} <= {
        *call.split()
    }
    assert "--spot" not in run("create", SPOT="false")[1][-1]


def test_setup_installs_the_build_with_tpus(run):
    done, calls = run("setup")
    assert (done.returncode, verbs(calls)) == (0, ["scp", "ssh"])
    assert "tensorflow-tpu==2.20.*" in calls[1]
    assert "gcsfuse --implicit-dirs 'kept' runs" in calls[1]


@pytest.mark.parametrize(("accelerator", "name"), [("v5litepod-8", "local"), ("v4-32", "mine")])
def test_train(run, accelerator, name):
    done, (call,) = run("train", "--task=digits", "--epochs=2 3", ACCELERATOR_TYPE=accelerator)
    assert done.returncode == 0
    assert f"TPU_NAME={name} .venv/bin/python scripts/train.py --strategy=tpu" in call
    assert "'--task=digits' '--epochs=2 3'" in call


def test_preempted_training_resumes(run):
    done, calls = run("train", PREEMPTIONS="2", STATE="PREEMPTED")
    assert done.returncode == 0
    again = ["train", "describe", "delete", "create", "scp", "ssh"]
    assert verbs(calls) == [*again, *again, "train"]
    assert "restart 2 continues from the backup" in done.stderr


def test_restarts_are_limited(run):
    done, calls = run("train", PREEMPTIONS="9", STATE="PREEMPTED", MAX_RESTARTS="1")
    assert done.returncode == 255
    assert verbs(calls).count("train") == 2
    assert "preempted 2 times" in done.stderr


def test_failed_training_is_not_restarted(run):
    done, calls = run("train", PREEMPTIONS="1", CODE="3")
    assert (done.returncode, verbs(calls)) == (3, ["train", "describe"])
    assert "exit code 3, and the slice was not preempted" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "must be create, setup, train or delete. Received: none"),
        (["begin"], {}, "Received: begin"),
        (["create", "--spot"], {}, "create takes no flags. Received: --spot"),
        (["create"], {"ZONE": ""}, "ZONE must be set"),
        (["create"], {"ACCELERATOR_TYPE": "v5e"}, "must end in a number"),
    ],
)
def test_invalid_arguments(run, arguments, environment, message):
    done, calls = run(*arguments, **environment)
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr


def test_help(run):
    done, calls = run("--help")
    assert (done.returncode, calls) == (0, [])
    assert "ACCELERATOR_TYPE" in done.stdout
