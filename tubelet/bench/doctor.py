"""What works on this machine, what is missing and how to get it."""

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tubelet.bench.environment import hardware, version_of
from tubelet.core.block_mask import BlockMask
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import IMPLEMENTATIONS, PREFERENCES, why_not


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if it is not fine."""

    what: str
    found: str
    fine: bool
    advice: str = ""


_OPTIONAL = (
    ("transformers", "hf", "video encoders and video LLMs"),
    ("diffusers", "hf", "video diffusion transformers"),
    ("matplotlib", "plot", "plots in reports"),
    ("triton", "cuda", "Triton kernels (Linux with a GPU)"),
    ("flash-attn-4", "cuda", "FlashAttention-4 on Hopper and Blackwell"),
)


def examine() -> list[Finding]:
    """Look at the machine; nothing is changed."""
    findings = [
        Finding("python", platform.python_version(), True),
        Finding("torch", torch.__version__, True),
        Finding("processor", hardware(torch.device("cpu")), True),
        _gpu(),
    ]
    for package, extra, purpose in _OPTIONAL:
        version = version_of(package)
        advice = "" if version else f'for {purpose}: pip install "tubelet[{extra}]"'
        findings.append(Finding(package, version or "missing", version is not None, advice))
    if version_of("torchvision") and torch.version.cuda is None:
        advice = "beside a CPU-only torch it breaks transformers and diffusers; uninstall it"
        findings.append(Finding("torchvision", version_of("torchvision") or "", False, advice))
    return findings + _kernels()


def to_dict(findings: list[Finding]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(finding) for finding in findings]


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("gpu", torch.cuda.get_device_name(), True)
    return Finding("gpu", "none", True, "everything runs on the CPU; kernels for GPUs stay unused")


BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _kernels() -> list[Finding]:
    """What each attention implementation takes here, asked of the code that decides."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    findings = [_preference(device) for device in devices]
    for name in IMPLEMENTATIONS:
        for device in devices:
            taken = [_taken(name, device, "dense", None), _taken(name, device, "block lists", 128)]
            findings.append(Finding(f"attention {name} on {device}", "; ".join(taken), True))
    return findings


def _preference(device: str) -> Finding:
    """What `impl="auto"` tries, fastest first, of what can run on the device."""
    orders = []
    for what, names in PREFERENCES.items():
        block = None if what == "dense" else 64 if what.startswith("64") else 128
        causal = what.startswith("causal")
        usable = [n for n in names if not _refusal(n, device, block, causal=causal)]
        orders.append(f"{what}: {', '.join(usable)}")
    return Finding(f"attention on {device}", "; ".join(orders), True)


def _taken(name: str, device: str, what: str, block: int | None) -> str:
    """Dtypes, and block sizes, of one kind of call; or why there are none."""
    dtypes = [d for d in DTYPES if _refusal(name, device, block, d) is None]
    if not dtypes:
        return f"no {what} ({_refusal(name, device, block)})"
    found = "every dtype" if len(dtypes) == len(DTYPES) else ", ".join(str(d)[6:] for d in dtypes)
    if block is None:
        return f"{what} in {found}"
    sizes = [size for size in BLOCKS if _refusal(name, device, size, dtypes[-1]) is None]
    return f"{what} of {', '.join(map(str, sizes))} tokens in {found}"


def _refusal(
    name: str,
    device: str,
    block: int | None,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
) -> str | None:
    q = torch.zeros(1, 1, 256, 64, device=device, dtype=dtype)
    mask = None
    if block is not None:
        kept = torch.ones(1, 1, 256 // block, 256 // block, dtype=torch.bool)
        mask = BlockMask.from_dense(kept, block=(block, block), num_queries=256, num_keys=256)
    with torch.no_grad():
        return why_not(name, q, q, q, AttentionPlan(mask=mask), causal=causal)
