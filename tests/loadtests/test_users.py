"""The users, against a deployment that remembers what they sent."""

import csv
import json
import subprocess
import sys

from app.certs import create_certificates
from app.report import NodeReport, Unchanged
from app.simulate import sample_reports
from tests.loadtests.deployment import NAMES, ROOT, Deployment, locust, row, serving

MARK = "x-tangram-dry-run"


def test_a_kube_scheduler_takes_each_pod_the_whole_way(tmp_path):
    """Sizes as asked, each once in turn; all that it bound is gone at the end."""
    deployment = Deployment()
    with serving(deployment.app()) as port:
        words = ["--host", f"http://127.0.0.1:{port}", "--sizes", "4,all", "--kept", "3", "--mix", "nvidia.com/gpu=2:1"]
        status, summary, printed = locust("KubeScheduler", *words, out=tmp_path)
    assert status == 0, printed
    assert {len(call.body["NodeNames"]) for call in deployment.to("/filter")} == {4, len(NAMES)}
    limits = [call.body["Pod"]["spec"]["containers"][0]["resources"]["limits"] for call in deployment.to("/filter")]
    assert all(each == {"nvidia.com/gpu": "2"} for each in limits)
    bound = {call.body["PodUID"] for call in deployment.to("/bind")}
    assert {call.path.rpartition("/")[2] for call in deployment.calls if call.method == "DELETE"} == bound
    assert not any(MARK in call.headers for call in deployment.calls)
    for name in ("filter 4", "filter 12", "prioritize 4", "prioritize 12", "bind", "release"):
        assert row(summary, name)["p50_ms"] > 0


def test_a_live_cluster_is_only_asked_and_told_that_nothing_is_meant(tmp_path):
    """Over TLS with a client certificate, as kube-scheduler comes; the public listener stays plain."""
    create_certificates(tmp_path, ips=["127.0.0.1"])
    files = {name: str(tmp_path / name) for name in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key")}
    deployment = Deployment(mode="kubernetes")
    tls = {"ssl_certfile": files["server.crt"], "ssl_keyfile": files["server.key"]}
    wanted = {"ssl_ca_certs": files["ca.crt"], "ssl_cert_reqs": 2}
    with serving(deployment.app()) as port, serving(deployment.app(), **tls, **wanted) as extender:
        words = ["--host", f"http://127.0.0.1:{port}", "--extender", f"https://127.0.0.1:{extender}"]
        words += ["--ca-file", files["ca.crt"], "--cert-file", files["client.crt"], "--key-file", files["client.key"]]
        status, _, printed = locust("KubeScheduler", *words, out=tmp_path)
    assert status == 0, printed
    sent = [call for call in deployment.calls if call.method != "GET"]
    assert {call.path for call in sent} == {"/filter", "/prioritize"}
    assert all(call.headers[MARK] == "true" for call in sent)


def test_a_live_cluster_that_proposes_all_the_same_is_left_alone_at_once(tmp_path):
    """A Tangram that does not know the mark keeps devices for pods that there are not."""
    deployment = Deployment(mode="kubernetes", knows=True)
    with serving(deployment.app()) as port:
        status, summary, printed = locust("KubeScheduler", "--host", f"http://127.0.0.1:{port}", out=tmp_path)
    assert status == 1, printed
    assert "does not keep to X-Tangram-Dry-Run" in " ".join(summary["failures"])
    assert len(deployment.to("/filter")) == 1


def test_calls_that_fail_fail_the_test(tmp_path):
    deployment = Deployment(error="Tangram is not ready")
    with serving(deployment.app()) as port:
        status, summary, printed = locust("KubeScheduler", "--host", f"http://127.0.0.1:{port}", out=tmp_path)
    assert status == 1, printed
    assert row(summary, "filter 12")["failed"] == row(summary, "filter 12")["sent"] > 0
    assert "Tangram is not ready" in summary["failures"][0]


def test_nobody_there_is_said_in_words(tmp_path):
    status, _, printed = locust("KubeScheduler", "--host", "http://127.0.0.1:9", out=tmp_path)
    assert status == 2
    assert "http://127.0.0.1:9 does not tell its nodes" in printed


def test_tenants_bring_the_pods_of_a_trace_at_their_own_times(tmp_path):
    """In the trace's order; pods without a GPU are none of ours; each leaves when its time is over."""
    trace = tmp_path / "pods.csv"
    with trace.open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec"])
        rows.writerows([["a", 4000, 1024, 4, 1000, ""], ["b", 1000, 64, 0, 0, ""], ["c", 500, 64, 1, 330, "T4"]])
    deployment = Deployment()
    with serving(deployment.app()) as port:
        words = ["--host", f"http://127.0.0.1:{port}", "--trace", str(trace), "--think", "0", "-u", "2", "-r", "2"]
        rate = ["--arrivals-per-second", "40", "--holding", "0.1"]
        status, summary, printed = locust("KubeScheduler", "Tenant", *words, *rate, out=tmp_path)
    assert status == 0, printed
    limits = [call.body["Pod"]["spec"]["containers"][0]["resources"]["limits"] for call in deployment.to("/filter")]
    assert limits[:4] == 2 * [{"nvidia.com/gpu": "4"}, {"tangram.gpu/share-milli": "330"}]
    assert row(summary, "arrival to node")["sent"] == row(summary, "bind")["sent"]
    assert row(summary, "release")["sent"] > 0


def test_agents_beat_report_changes_and_all_of_it_when_asked(tmp_path):
    """Every body is one that the service reads; the token goes along; a new boot where all was asked for."""
    reports = sample_reports("8xH100:2,4xA30-mig:1")
    (tmp_path / "nodes.json").write_text(json.dumps([each.model_dump(mode="json", by_alias=True) for each in reports]))
    (tmp_path / "token").write_text("secret\n")
    deployment = Deployment()
    with serving(deployment.app()) as port:
        words = ["--host", f"http://127.0.0.1:{port}", "--agents-file", str(tmp_path / "nodes.json")]
        rate = ["--agents-every", "0.2", "--agents-changes", "0.5", "--agents-token", str(tmp_path / "token")]
        status, summary, printed = locust("Agents", *words, *rate, out=tmp_path)
    assert status == 0, printed
    calls = deployment.to("/v1/reports")
    assert {call.body["node"] for call in calls} == {report.node for report in reports}
    assert all(call.headers["authorization"] == "Bearer secret" for call in calls)
    for node in (report.node for report in reports):
        said = [call.body for call in calls if call.body["node"] == node]
        read = [(NodeReport if "gpus" in each else Unchanged).model_validate(each) for each in said]
        assert read[1].boot.startswith("loadtest-")
        assert isinstance(read[1], NodeReport)
        assert [each.version for each in read[1:]] == sorted(each.version for each in read[1:])
        assert len({each.boot for each in read[1:]}) == 1
    assert row(summary, "beat")["from_due"]["p99_ms"] >= row(summary, "beat")["p50_ms"]


def test_the_whole_run_ends_well_and_leaves_its_files(tmp_path):
    """`make loadtest`, small: a real service, the echo's replies are Tangram's, every part has its files."""
    options = ["--nodes", "8xH100:6", "--mix", "whole", "--sizes", "3,all", "--seconds", "6", "--every", "1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "loadtests.run",
            *options,
            "--arrivals",
            "20",
            "--holding",
            "0.2",
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = {part["name"]: part for part in summary["parts"]}
    assert list(parts) == ["alone", "beside agents", "agents", "arrivals"]
    assert summary["failures"] == []
    assert parts["alone"]["driver_late"]["p99_ms"] > 0
    filtered = row(parts["alone"], "filter 6")
    assert filtered["p50_ms"] <= filtered["p90_ms"] <= filtered["p99_ms"] <= filtered["max_ms"]
    assert filtered["to_echo"]["p50"] > 0
    assert (filtered["verb"], filtered["nodes"], filtered["failed"]) == ("filter", 6, 0)
    assert row(parts["agents"], "beat")["sent"] > 0
    assert row(parts["arrivals"], "arrival to node")["sent"] > 0
    for name in ("alone", "beside-agents", "agents", "arrivals"):
        assert (tmp_path / f"{name}.html").stat().st_size > 0
        assert (tmp_path / f"{name}_stats.csv").stat().st_size > 0


def test_a_shape_sets_how_many_users_there_are(tmp_path, monkeypatch):
    """`steps`, with six users at most: the deployment hears of more and more of them."""
    monkeypatch.setenv("LOAD_SHAPE", "steps")
    deployment = Deployment()
    with serving(deployment.app()) as port:
        words = ["--host", f"http://127.0.0.1:{port}", "-u", "6"]
        status, summary, printed = locust("KubeScheduler", *words, out=tmp_path, seconds=4)
    assert status == 0, printed
    assert summary["shape"] == "steps"
    assert "updating to 1 users" in printed
    assert "updating to 4 users" in printed or "updating to 5 users" in printed
