"""What the training runs on: the keys of a file of `recipes/hardware`."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.section import Count, Section


class Hardware(Section):
    """What the training runs on; a file of `recipes/hardware`."""

    device: Literal["cpu", "cuda"]
    num_nodes: Count = 1
    processes_per_node: Count = 1
    threads_per_process: Count = 1
    strategy: Literal["ddp", "zero2", "zero3"] = "zero2"
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
