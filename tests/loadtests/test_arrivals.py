"""Which pods come and when."""

import itertools
import random
from statistics import fmean

import pytest

from app.errors import BadInput
from app.translate import GPU_RESOURCE, MIG_RESOURCE_PREFIX, SHARE_MILLI_RESOURCE
from loadtests.arrivals import GPU, MIG, MIXES, SHARE, BadMix, asks, asks_of_trace, mix_called, poisson

HEAD = "cpu_milli,memory_mib,num_gpu,gpu_milli\n"


def test_resources_are_spelled_as_tangram_reads_them():
    assert (GPU, MIG, SHARE) == (GPU_RESOURCE, MIG_RESOURCE_PREFIX, SHARE_MILLI_RESOURCE)


def test_a_mix_has_a_name_or_is_written_out():
    assert mix_called("whole") is MIXES["whole"]
    written = mix_called("nvidia.com/gpu=4:1, nvidia.com/mig-1g.10gb=1:3,tangram.gpu/share-milli=250")
    assert written == {(GPU, 4): 1, (f"{MIG}1g.10gb", 1): 3, (SHARE, 250): 1}


@pytest.mark.parametrize("text", ["hole", "nvidia.com/gpu", "nvidia.com/gpu=x", "nvidia.com/gpu=1:x", ""])
def test_what_is_no_mix_is_said_in_words(text):
    with pytest.raises(BadMix, match="is no mix"):
        mix_called(text)


def test_a_mix_is_drawn_by_its_weights():
    drawn = list(itertools.islice(asks("nvidia.com/gpu=1:9,nvidia.com/gpu=8:1", "", random.Random(1)), 2000))
    assert 0.05 < fmean(count == 8 for _, count in drawn) < 0.15


def test_a_trace_gives_its_gpu_pods_in_order_again_and_again(tmp_path):
    path = tmp_path / "pods.csv"
    path.write_text(HEAD + "1,1,8,1000\n1,1,0,0\n1,1,1,250\n1,1,1,1000\n")
    wanted = [(GPU, 8), (SHARE, 250), (GPU, 1)]
    assert list(asks_of_trace(path)) == wanted
    assert list(itertools.islice(asks("whole", str(path), random.Random(1)), 6)) == 2 * wanted


def test_a_trace_that_is_none_is_said_in_words(tmp_path):
    with pytest.raises(BadInput, match="cannot read"):
        asks_of_trace(tmp_path / "none.csv")


def test_pods_come_and_stay_as_long_as_asked_on_average():
    rng = random.Random(1)
    coming = list(itertools.islice(poisson(asks("mixed", "", rng), rng, per_second=20, holding_seconds=60), 4000))
    assert 0.9 / 20 < fmean(each.after_seconds for each in coming) < 1.1 / 20
    assert 54 < fmean(each.holds_seconds for each in coming) < 66
