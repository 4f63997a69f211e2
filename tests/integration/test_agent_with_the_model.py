"""An agent that thinks with the language model that ships: one tool, and its result in words."""

from contextlib import aclosing
from pathlib import Path

import pytest

from node_agent.runtimes.agent import AgentRuntime
from node_agent.runtimes.base import Final, Progress, Request, RuntimeContext
from node_agent.runtimes.llama_cpp import LlamaCppRuntime
from support.calls import spec_of
from support.local_functions import DirectFunctions

MODEL = next((Path(__file__).parents[2] / "foam" / "models").glob("*.gguf"))


class Plant:
    """The functions of the mesh: every sensor reads the same."""

    def __init__(self):
        self.tasks = []

    async def ask(self, task, *, timeout_s):
        self.tasks.append(task)
        yield Final(output="71.5 C")


@pytest.mark.llm
async def test_the_language_model_that_ships_chooses_a_tool_and_puts_its_result_into_words():
    text = {"type": "string", "maxLength": 40}

    def tool(name, about, *parameters):
        schema = {
            "type": "object",
            "properties": dict.fromkeys(parameters, text),
            "required": list(parameters),
            "additionalProperties": False,
        }
        return {"use": f"mesh:{name}", "description": about, "parameters": schema}

    tools = [
        tool("read_sensor", "Read a sensor", "device", "metric"),
        tool("close_valve", "Close a valve", "valve"),
        tool("stop_device", "Stop a machine", "device"),
    ]
    options = {"tools_template": "Tools:\n{signatures}", "max_tokens": 96}
    chat = spec_of("llama_cpp", name="chat", model=str(MODEL), options=options)
    agent = spec_of("agent", name="helper", options={"model": "chat", "tools": tools})
    mesh = Plant()
    runtimes = {"llama_cpp": LlamaCppRuntime(RuntimeContext())}
    async with DirectFunctions([chat, agent], runtimes) as local:
        runtime = AgentRuntime(RuntimeContext(local=local, mesh=mesh))
        instance = await runtime.start(agent, died=lambda _: None)
        words = "Read the temperature of pump-7."
        asked = Request(id="r", input={"text": words}, text=words, left_ms=60_000)
        try:
            async with aclosing(instance.invoke(asked)) as answers:
                seen = [item async for item in answers]
        finally:
            await instance.close(1.0)
    (task,) = mesh.tasks
    assert task["function"] == "read_sensor"
    assert task["input"] == {"device": "pump-7", "metric": "temperature"}
    assert [item.state for item in seen if isinstance(item, Progress)] == ["running", "finished"]
    final = seen[-1]
    assert isinstance(final, Final)
    assert final.output == "The temperature of pump-7 is 71.5 C."
    assert final.usage["output_tokens"] > 0
    assert final.confidence is not None
    assert 0 < final.confidence <= 1
