"""`scripts/jobset.yaml`: that Kubernetes would accept it, and what tfbig finds in its pods.

On 27 November 2026, the manifest was checked against the schema of JobSet 0.13
(config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml). What could break here are the names of
fields, and numbers and names that must be the same in several places.
"""

import re

import pytest
import yaml

from tests import job
from tfbig import callbacks
from tfbig.distribute import _cluster, _kubernetes

# What the schema allows, in the objects that the manifest has.
FIELDS = {
    "spec": "coordinator failurePolicy managedBy network replicatedJobs startupPolicy "
    "successPolicy suspend ttlSecondsAfterFinished volumeClaimPolicies",
    "spec.failurePolicy": "maxRestarts restartStrategy rules",
    "spec.failurePolicy.rules": "action name onJobFailureMessagePatterns onJobFailureReasons "
    "targetReplicatedJobs",
    "spec.replicatedJobs": "dependsOn groupName name replicas template",
    "spec.replicatedJobs.template": "metadata spec",
    "spec.replicatedJobs.template.spec": "activeDeadlineSeconds backoffLimit backoffLimitPerIndex "
    "completionMode completions managedBy manualSelector maxFailedIndexes parallelism "
    "podFailurePolicy podReplacementPolicy selector successPolicy suspend template "
    "ttlSecondsAfterFinished",
    "spec.replicatedJobs.template.spec.podFailurePolicy": "rules",
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": "action onExitCodes "
    "onPodConditions",
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes": "containerName "
    "operator values",
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onPodConditions": "status type",
}
# Kubernetes's own, of which the schema has many more.
POD = "spec.replicatedJobs.template.spec.template"


@pytest.fixture(scope="module")
def manifest():
    jobset, policy = yaml.safe_load_all((job.ROOT / "scripts" / "jobset.yaml").read_text())
    return jobset, policy


def fields(value, path):
    """Pairs of a path in the manifest and the name of a field there."""
    if isinstance(value, list):
        for item in value:
            yield from fields(item, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield path, name
            yield from fields(item, f"{path}.{name}")


def test_its_fields_are_those_of_the_schema(manifest):
    jobset, _ = manifest
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    found = [f for f in fields(jobset["spec"], "spec") if not f[0].startswith(POD)]
    assert {path for path, _ in found} == set(FIELDS)
    assert [f"{path}.{name}" for path, name in found if name not in FIELDS[path].split()] == []


def test_all_workers_start_and_end_together(manifest):
    jobset, _ = manifest
    (group,) = jobset["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    assert group["replicas"] == 1
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    assert spec["completions"] == spec["parallelism"] == int(variables(jobset)["TFBIG_WORKERS"])


def test_a_preempted_job_starts_again_and_is_not_counted(manifest):
    jobset, _ = manifest
    (group,) = jobset["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    # Kubernetes's condition for a podFailurePolicy.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    by_code, by_condition = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    assert by_code == {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": container["name"],
            "operator": "In",
            "values": [callbacks.PREEMPTED],
        },
    }
    assert by_condition["action"] == "FailJob"
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    # A Job that a rule of its policy fails has this reason.
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def variables(jobset):
    """What the manifest has in the environment of a pod, as JobSet 0.13 and Kubernetes label it."""
    name = jobset["metadata"]["name"]
    (group,) = jobset["spec"]["replicatedJobs"]
    labels = {
        "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": name,
        "metadata.labels['batch.kubernetes.io/job-name']": f"{name}-{group['name']}-0",
    }
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    return {
        entry["name"]: entry["value"]
        if "value" in entry
        else labels[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
    }


@pytest.mark.parametrize("index", [0, 1])
def test_tfbig_finds_the_other_workers(manifest, index, monkeypatch):
    jobset, _ = manifest
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables(jobset).items():
        monkeypatch.setenv(name, value)
    # Kubernetes sets it in each pod of an indexed Job.
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
    # The names that JobSet gives its pods: <jobset>-<replicated job>-<job>-<pod>.<service>.
    addresses = [f"tfbig-digits-workers-0-{i}.tfbig-digits:2222" for i in range(2)]
    assert _cluster.find() == _cluster.Cluster({"worker": addresses}, "worker", index, "Kubernetes")


def test_only_the_workers_may_connect(manifest):
    jobset, policy = manifest
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    own = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]}}
    assert policy["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }
    (group,) = jobset["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["ports"] == [{"containerPort": _kubernetes.PORT}]
    assert pod["automountServiceAccountToken"] is False


def test_backups_lie_where_all_workers_see_them(manifest):
    jobset, _ = manifest
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert "persistentVolumeClaim" in volume
    backup = re.search(r"--backup_dir=(\S+)", " ".join(container["command"]))[1]
    assert backup.startswith(mount["mountPath"] + "/")
    for needed in ("cpu", "memory"):
        assert container["resources"]["requests"][needed]
