"""A cluster of Ray with two nodes on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def two_nodes() -> Iterator[str]:
    """Give the address of two nodes with a core each; skips where Ray isn't installed."""
    pytest.importorskip("ray", reason="Ray isn't installed (extra `ray`)")
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        del node["include_dashboard"]
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
