"""How the shipped language model is made: generator, trainer, export, evaluation.

A language model small enough for a repository cannot learn a language, but it can learn a few
narrow tasks well. The steps, each a module:

1. `words`, `frames`, `wordings`, `readings`, `wishes`, `toolcalls` and `steps` hold what is talked
   about and how; `corpus` draws seeded examples, whose right answers are computed, never guessed.
2. `tokenizer` learns a vocabulary from them and writes a conversation as token ids.
3. `network` is a small Llama in torch, `train` trains it on one processor core.
4. `export` writes the GGUF file that llama.cpp runs.
5. `evaluate` asks that file, through llama.cpp, questions that training never saw.

``python -m foam.models.training --help`` runs them; ``foam/models/README.md`` has the commands with
which the shipped file was made, and how well it does. Needs the extra ``train``.
"""
