"""The GPUs that are counted are those that training processes will see."""

import sys

import pytest

from pipelines.preflight.machine import MIB, count_gpus, look_around

LISTED = """\
GPU-aaaa, NVIDIA H200, 143771, 10
GPU-bbbb, NVIDIA H200, 143771, 100000
GPU-cccc, NVIDIA A100-SXM4-40GB, 40960, 0
GPU-cdcd, NVIDIA GH200 480GB, [N/A], [N/A]
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put an nvidia-smi first on PATH that lists what it is given."""

    def install(listed: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nprint({listed!r}, end='')\nsys.exit({code})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_all_gpus_of_the_driver_are_counted_and_the_smallest_and_the_fullest_measured(driver):
    driver(LISTED)

    machine = look_around()

    assert machine.gpus == count_gpus() == 4
    assert (machine.gpu_name, machine.gpu_memory) == ("NVIDIA A100-SXM4-40GB", 40960 * MIB)
    assert machine.gpu_free == 40960 * MIB
    assert machine.memory > 0


@pytest.mark.parametrize(
    ("visible", "gpus", "name", "free"),
    [
        ("1", 1, "NVIDIA H200", 43771),
        ("0,1", 2, "NVIDIA H200", 43771),
        ("GPU-aa, GPU-cc", 2, "NVIDIA A100-SXM4-40GB", 40960),
        ("3", 1, "NVIDIA GH200 480GB", None),
        ("", 0, None, None),
        ("-1", 0, None, None),
        ("0,9,1", 1, "NVIDIA H200", 143761),
        ("GPU-c", 0, None, None),  # of two, so CUDA takes none
        ("MIG-GPU-aaaa/1/0", 1, "MIG", None),
    ],
)
def test_what_cuda_visible_devices_hides_is_not_there(
    driver, monkeypatch, visible, gpus, name, free
):
    driver(LISTED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    machine = look_around()

    assert (machine.gpus, machine.gpu_name) == (gpus, name)
    assert machine.gpu_free == (None if free is None else free * MIB)


def test_a_driver_that_fails_or_is_missing_lists_no_gpu(driver, tmp_path):
    driver("NVIDIA-SMI has failed because it couldn't communicate with the driver\n", code=9)
    assert look_around().gpus == 0

    (tmp_path / "nvidia-smi").unlink()
    assert look_around().gpus == 0
