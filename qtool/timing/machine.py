"""The card: what it is, how fast its clock runs under load, and what is missing to use it."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtool.errors import BackendError, require
from qtool.runtime.backends.cuda.launch import OLDEST

USUAL_L2_BYTES = 50 * 2**20
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
PATIENCE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What numbers of a run hold for."""

    card: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    torch: str
    cuda: str
    driver: str = ""
    """Empty, like the numbers below None, where nvidia-smi says nothing."""
    sm_clock_mhz: int | None = None
    """While it copies."""
    max_sm_clock_mhz: int | None = None
    power_limit_watts: float | None = None


def require_card() -> torch.device:
    """Return the card.

    Raises:
        BackendError: there is none that the kernels run on.
        MissingExtraError: CuPy isn't installed.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            f"`qtool bench --gpu` needs a CUDA card, and torch {torch.__version__} sees none. Run "
            "it on a machine with a card and a CUDA build of torch; without --gpu, `qtool bench "
            "OUT_DIR` times the model through torch."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < OLDEST:
        raise BackendError(
            f"{torch.cuda.get_device_name(device)} is older than the kernels allow: they need "
            "compute capability 8.0. Without --gpu, `qtool bench OUT_DIR` uses torch."
        )
    require("`qtool bench --gpu`", "gpu", "cupy")
    return device


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0)) or USUAL_L2_BYTES


def describe_card(device: torch.device, load: Callable[[], object]) -> Machine:
    """Return what the card is; `load` is what it does while the clock is read."""
    properties = torch.cuda.get_device_properties(device)
    told = _nvidia_smi(str(getattr(properties, "uuid", "")), load)
    return Machine(
        card=properties.name,
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=l2_bytes(device),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        driver=told.get("driver_version", ""),
        sm_clock_mhz=_whole(told.get("clocks.sm")),
        max_sm_clock_mhz=_whole(told.get("clocks.max.sm")),
        power_limit_watts=_number(told.get("power.limit")),
    )


def _nvidia_smi(uuid: str, load: Callable[[], object]) -> dict[str, str]:
    """Ask while the card is busy: an idle one lowers its clock."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    if uuid:  # torch numbers the cards that it may see, nvidia-smi all
        command.append(f"--id=GPU-{uuid.removeprefix('GPU-')}")
    try:
        asked = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while asked.poll() is None:
        load()
        if time.monotonic() > deadline:
            asked.kill()
    return parse_query(asked.communicate()[0])


def parse_query(text: str) -> dict[str, str]:
    """Return the answer for the first card, by name of the question."""
    values = [value.strip() for value in text.strip().split("\n")[0].split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {}


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


class Clock:
    """Time of a device, and memory of a card; each reading waits for what was launched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self) -> float:
        """Return the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def memory(self) -> int:
        """Return the bytes in use, and start to look for the peak."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_memory(self) -> int:
        """Return the most bytes in use since `memory`."""
        return torch.cuda.max_memory_allocated(self.device)
