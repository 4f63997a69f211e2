"""The environment of child processes: what programs need to run, and none of our secrets."""

import math
import os
from typing import Any, Final

_PASSED: Final = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "LANG", "LANGUAGE", "VIRTUAL_ENV"),
    *("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES"),
    *("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR"),
}
_PASSED_PREFIXES: Final = ("LC_", "PYTHON", "OMP_", "OPENBLAS_", "MKL_", "GGML_")
_PROXIES: Final = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def child_environment(*, folder: str, limits: dict[str, Any]) -> dict[str, str]:
    """Return the environment of an instance.

    Everything else of ours stays out, and with it passwords and tokens. Proxies, whose addresses
    may hold a password, go to instances with a network only. Numeric libraries get as many threads
    as the function has processors, one when it does not say: a node runs many instances at a time.

    Args:
        folder: Folder of its temporary files.
        limits: As made by `limits_frame`.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED
        or name.startswith(_PASSED_PREFIXES)
        or (limits.get("network") and name.upper() in _PROXIES)
    }
    threads = dict.fromkeys(_THREADS, str(math.ceil(limits.get("cpus") or 1)))
    return {**threads, **passed, "TMPDIR": folder}
