"""The function whose work is nothing, so that what remains is the mesh."""

from foam import function


@function(
    description="Echo: give the words of the task back unchanged.",
    examples=["echo these words", "repeat after me: nine", "say again what I say: lamp"],
    warm=True,
)
def echo(text: str) -> str:
    return text
