# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of calls, for benchmarks and tests."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph's replay, captured after three runs beside the current stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
