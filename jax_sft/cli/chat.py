"""`jax-sft chat`."""

import argparse

from jax_sft.cli.start import (
    EXIT_OK,
    load,
)


def run_chat(options: argparse.Namespace, _: list[str]) -> int:
    """Talk, or answer once."""
    from jax_sft.chat import talk
    from jax_sft.generate import Sampling

    sampling = Sampling(
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    assistant = load(options, options.model, chat_template=options.chat_template, adapters=options.adapter)
    history = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompt is not None:
        history.append({"role": "user", "content": options.prompt})
        print(assistant.answer(history, max_new_tokens=options.max_new_tokens, sampling=sampling).text)
        return EXIT_OK
    talk(assistant, history, sampling=sampling, max_new_tokens=options.max_new_tokens)
    return EXIT_OK
