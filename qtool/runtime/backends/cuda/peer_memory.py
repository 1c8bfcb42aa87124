"""Memory of other processes' cards, through CUDA's handles for that, by CuPy."""

from qtool.runtime.tensor_parallel import TensorParallel


def shared_zeros(group: TensorParallel, size: int) -> list[int] | str:
    """Return where each rank's memory is for this one, by rank; it is kept to the process's end.

    Every rank calls it.

    Args:
        group: The ranks, each on a card.
        size: Bytes, zeros.

    Returns:
        Addresses; or, on all ranks, why one can't have them.
    """
    mine = _handle(group, size)
    told = group.gather_objects(mine[1])
    failed = next((text for text in told if isinstance(text, str)), None)
    opened = failed or _open(group, told, mine[0])
    reasons = group.gather_objects(opened if isinstance(opened, str) else None)
    return next((text for text in reasons if text is not None), opened)


def _handle(group: TensorParallel, size: int) -> tuple[int, bytes | str]:
    """Return memory of this card, and what others need to open it; or why not."""
    try:
        from cupy.cuda import Device, runtime

        with Device(group.device.index):
            address = runtime.malloc(size)
            runtime.memset(address, 0, size)
            runtime.deviceSynchronize()
            return int(address), bytes(runtime.ipcGetMemHandle(address))
    except Exception as error:  # noqa: BLE001 - NCCL can do it
        return 0, f"{type(error).__name__}: {error}"


def _open(group: TensorParallel, handles: list[bytes], own: int) -> list[int] | str:
    try:
        from cupy.cuda import Device, runtime

        with Device(group.device.index):
            return [
                own if rank == group.rank else int(runtime.ipcOpenMemHandle(handle))
                for rank, handle in enumerate(handles)
            ]
    except Exception as error:  # noqa: BLE001 - NCCL can do it
        return f"{type(error).__name__}: {error}"
