"""What is committed in `manifests/` follows from the code, and the two agree on every name."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.agent.agent import run_agent
from app.agent.giving import Giving
from app.certs import SECRET_NAME, service_dns_names
from app.errors import BadInput
from app.journal import SUFFIX
from app.manifests import (
    EXTENDER_PORT,
    FORMS,
    Form,
    admission_policy,
    base_kustomization,
    generated_files,
    managed_resource_names,
    scheduler_configuration,
    write_manifests,
)
from app.settings import Settings
from app.translate import PLACEMENT_ANNOTATION, resource_of_profile
from app.trust import AUDIENCE
from solver.products import PRODUCTS

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a file by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((MANIFESTS / name).read_text())}


def extender(form: Form) -> dict[str, Any]:
    (entry,) = scheduler_configuration(form)["extenders"]
    assert isinstance(entry, dict)
    return entry


def test_committed_files_are_what_the_generator_makes() -> None:
    """Else: `tangram manifests --out manifests`."""
    for name, text in generated_files().items():
        assert (MANIFESTS / name).read_text() == text, name


def test_files_are_written_where_they_belong(tmp_path: Path) -> None:
    written = write_manifests(
        tmp_path, forms=("first",), image="mirror/tangram:2", namespace="gpu", url="https://10.0.0.9:8443"
    )

    assert {str(file.relative_to(tmp_path)) for file in written} == {
        "base/kustomization.yaml",
        "base/admission.yaml",
        "overlays/first-scheduler/scheduler-configuration.yaml",
    }
    configuration = yaml.safe_load(written[-1].read_text())
    assert configuration["extenders"][0]["urlPrefix"] == "https://10.0.0.9:8443"
    assert configuration["extenders"][0]["tlsConfig"]["serverName"] == "tangram.gpu.svc"
    assert "system:serviceaccount:gpu:tangram" in (tmp_path / "base/admission.yaml").read_text()


def test_every_profile_of_every_product_is_managed() -> None:
    """The list is matched by exact name: a pod that asks for a missing one bypasses us without a word."""
    names = managed_resource_names()

    profiles = [profile.name for product in PRODUCTS if product.geometry for profile in product.geometry.profiles]
    assert {resource_of_profile(profile) for profile in profiles} <= set(names)
    assert len(names) == len(set(names)) > 70
    assert names[:4] == ("nvidia.com/gpu", "tangram.gpu/share", "tangram.gpu/share-milli", "tangram.gpu/ask")
    assert "nvidia.com/mig-1g.10gb.me" in names


def test_managed_names_are_legal_resource_names() -> None:
    """kube-scheduler refuses to start otherwise: '+' of a profile becomes '.'."""
    for name in managed_resource_names():
        _, _, last = name.partition("/")
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", last), name


def test_first_form_manages_all_of_them_and_ignores_only_the_marker() -> None:
    managed = extender("first")["managedResources"]

    assert [each["name"] for each in managed] == list(managed_resource_names())
    assert [each["name"] for each in managed if each["ignoredByScheduler"]] == ["tangram.gpu/ask"]


def test_second_form_is_asked_about_every_pod_of_its_name() -> None:
    configuration = scheduler_configuration("second")

    assert extender("second")["managedResources"] == []
    assert [profile["schedulerName"] for profile in configuration["profiles"]] == ["tangram"]
    assert configuration["leaderElection"]["resourceName"] == "tangram-scheduler"


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_ask_as_the_service_answers(form: Form) -> None:
    entry = extender(form)

    assert (entry["nodeCacheCapable"], entry["ignorable"], entry["enableHTTPS"], entry["weight"]) == (
        True,
        False,
        True,
        1,
    )
    assert {entry[f"{verb}Verb"] for verb in ("filter", "prioritize", "bind", "preempt")} == {
        "filter", "prioritize", "bind", "preempt",
    }  # fmt: skip
    assert entry["tlsConfig"]["serverName"] in service_dns_names()
    assert scheduler_configuration(form)["percentageOfNodesToScore"] == 100
    timeout = float(entry["httpTimeout"].removesuffix("s"))
    assert timeout > Settings.model_fields["bind_deadline_seconds"].default


def test_policy_guards_the_annotation_that_we_write() -> None:
    policy, binding = admission_policy()

    text = yaml.safe_dump(policy)
    assert PLACEMENT_ANNOTATION in text
    assert policy["spec"]["failurePolicy"] == "Fail"
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("tangram:1", {"newName": "tangram", "newTag": "1"}),
        ("mirror:5000/a/tangram:1", {"newName": "mirror:5000/a/tangram", "newTag": "1"}),
        ("a/tangram@sha256:ab", {"newName": "a/tangram", "digest": "sha256:ab"}),
    ],
)
def test_image_can_be_given_in_any_usual_form(image: str, expected: dict[str, str]) -> None:
    assert base_kustomization(image=image)["images"] == [{"name": "tangram", **expected}]


@pytest.mark.parametrize("image", ["tangram", "mirror:5000/tangram", ":1", ""])
def test_image_without_a_version_is_refused(image: str) -> None:
    with pytest.raises(BadInput, match="--image"):
        base_kustomization(image=image)


def test_deployment_sets_only_settings_that_exist() -> None:
    spec = documents("base/deployment.yaml")["Deployment"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    for variable in container["env"]:
        assert variable["name"].removeprefix("TANGRAM_").lower() in Settings.model_fields


def test_deployment_is_alone_and_its_settings_are_not_overwritten_by_its_own_service() -> None:
    """Kubernetes would set TANGRAM_PORT=tcp://... for a Service called tangram, in every pod of its namespace."""
    spec = documents("base/deployment.yaml")["Deployment"]["spec"]

    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    for name, kind in (("deployment", "Deployment"), ("agent", "DaemonSet")):
        assert documents(f"base/{name}.yaml")[kind]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_service_may_write_its_lease_and_its_journal_and_no_other() -> None:
    (rules,) = [
        each["rules"]
        for each in yaml.safe_load_all((MANIFESTS / "base/rbac.yaml").read_text())
        if each["kind"] == "Role"
    ]
    lease = Settings.model_fields["lease_name"].default

    named = {rule["resources"][0]: rule["resourceNames"] for rule in rules if "update" in rule["verbs"]}
    assert named == {"leases": [lease], "configmaps": [lease + SUFFIX]}


def test_agent_calls_the_service_that_is_shipped() -> None:
    """By the name that its certificate has, and with files that are mounted."""
    service = documents("base/service.yaml")["Service"]
    pod = documents("base/agent.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    options = dict(word.split("=", 1) for word in agent["args"] if "=" in word)

    agent_port = Settings.model_fields["agent_port"].default
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert options["--service"] == f"https://{host}:{agent_port}"
    assert host in service_dns_names()
    assert {port["port"] for port in service["spec"]["ports"]} == {8080, EXTENDER_PORT, agent_port}
    mounts = {mount["mountPath"] for mount in agent["volumeMounts"]}
    for option in ("--token-file", "--ca-file"):
        assert str(Path(options[option]).parent) in mounts
    assert options["--state-dir"] in mounts


def test_agent_reaches_the_kubelet_where_it_listens_and_keeps_what_it_has_handed_out() -> None:
    """Folders of the host at the paths that are the options' defaults: the kubelet makes its sockets anew."""
    pod = documents("base/agent.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    hosts = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    mounts = {mount["mountPath"]: hosts.get(mount["name"]) for mount in agent["volumeMounts"]}
    kubelet = "/var/lib/kubelet"

    for path in (f"{kubelet}/device-plugins", f"{kubelet}/pod-resources", "/var/run/cdi", "/var/lib/tangram"):
        assert mounts[path] == path
    defaults = inspect.signature(run_agent).parameters
    assert defaults["kubelet_dir"].default == Path(kubelet)
    assert Giving().cdi_dir == Path("/var/run/cdi")


def test_agents_change_nothing_beside_nvidias_plugin_unless_the_component_says_so() -> None:
    pod = documents("base/agent.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    args = pod["containers"][0]["args"]
    component = yaml.safe_load((MANIFESTS / "components/device-plugin/kustomization.yaml").read_text())
    patch = yaml.safe_load(component["patches"][0]["patch"])
    root = "/spec/template/spec/containers/0/args/"

    assert {"--hand=observe", "--mig=observe"} <= set(args)
    for step in patch:
        number = int(step["path"].removeprefix(root))
        if step["op"] == "test":
            assert args[number] == step["value"]
        args[number] = step["value"]
    assert {"--hand=plugin", "--mig=make"} <= set(args)


def test_agents_token_and_ca_are_those_that_the_service_expects() -> None:
    pod = documents("base/agent.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (source,) = volumes["token"]["projected"]["sources"]

    assert source["serviceAccountToken"]["audience"] == AUDIENCE
    assert pod["serviceAccountName"] == Settings.model_fields["agent_account"].default
    assert volumes["ca"]["configMap"]["name"] == f"{SECRET_NAME}-ca"


def test_nothing_is_opened_on_a_node_and_agents_reach_one_port_only() -> None:
    (agent,) = documents("base/agent.yaml")["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    policies = list(yaml.safe_load_all((MANIFESTS / "base/networkpolicy.yaml").read_text()))
    of_service, of_agent = (each["spec"] for each in policies)
    agents = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "tangram-agent"}}}
    reached = [rule["ports"] for rule in of_service["ingress"] if agents in rule.get("from", [])]

    assert "ports" not in agent
    assert of_agent["policyTypes"] == ["Ingress"]
    assert "ingress" not in of_agent
    assert reached == [[{"port": "agents", "protocol": "TCP"}]]


def test_service_leads_to_the_pod_and_its_ports() -> None:
    """Also while it is not ready: its agents' reports must get through, and kube-scheduler be told why."""
    service = documents("base/service.yaml")["Service"]["spec"]
    pod = documents("base/deployment.yaml")["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]

    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert {port["targetPort"] for port in service["ports"]} <= {port["name"] for port in container["ports"]}
    assert service["publishNotReadyAddresses"] is True


def test_every_sample_asks_for_what_we_manage() -> None:
    for file in (MANIFESTS / "samples").glob("*.yaml"):
        asked = re.findall(r"limits: \{([^:]+):", file.read_text())
        assert asked or file.name == "kustomization.yaml"
        assert set(asked) <= set(managed_resource_names()), file.name


def test_no_registry_host_is_named() -> None:
    """Images are named plainly; where they come from is the cluster's own matter."""
    for file in MANIFESTS.rglob("*.yaml"):
        for image in re.findall(r"^\s*(?:-\s*)?(?:image|newName):\s*(\S+)", file.read_text(), re.MULTILINE):
            assert "." not in image.split("/")[0].split(":")[0], (file.name, image)
