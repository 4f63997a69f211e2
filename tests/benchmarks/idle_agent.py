"""How much memory a node agent takes with fifty functions and no instance."""

from typing import Any

from benchmarks.agent_footprint import start_once
from benchmarks.measure import BenchMesh, p50

FUNCTIONS = 50


async def measure(mesh: BenchMesh, *, rounds: int = 3) -> dict[str, Any]:
    folder = mesh.data / "fifty"
    folder.mkdir(exist_ok=True)
    source = "from foam import function\n" + "".join(
        f'\n\n@function(description="Add {number} to a number.", examples=["{number} plus 3"])\n'
        f"def add_{number}(a: float) -> float:\n"
        f"    return a + {number}\n"
        for number in range(FUNCTIONS)
    )
    declaration = folder / "fifty.py"
    declaration.write_text(source)
    idle = mesh.data / "one.py"
    idle.write_text(
        source.partition("\n\n@function")[0] + "\n\n@function" + source.split("@function")[1]
    )
    one = [await start_once(mesh, idle) for _ in range(rounds)]
    fifty = [await start_once(mesh, declaration) for _ in range(rounds)]
    return {
        "broker": mesh.broker,
        "functions": FUNCTIONS,
        "ready p50 s": p50([run[0] for run in fifty]),
        "agent resident MB p50": round(p50([run[1] for run in fifty]), 1),
        "with one function MB p50": round(p50([run[1] for run in one]), 1),
        "its children resident MB p50": round(p50([run[2] for run in fifty]), 1),
    }
