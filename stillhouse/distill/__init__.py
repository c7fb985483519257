"""Train a LoRA student against a teacher: data, models, rollouts, losses, and the training loop.

Reading order:
    run, loaded, roles, average          one run from its spec to its adapter; what it loads
    teacher, teacher_places, teacher_cache, teacher_client, teacher_server
                                         what is asked of a teacher, and where its model is
    models, loading, head, layers        base models; logits from hidden states; which weights count
    quant, adapters                      the quantized base, and the LoRA adapter with its contract
    pairs, hub, tokenizers_match, cache  where weights come from; whether the two halves fit
    toy/, same_kernels                   models and problems that the project generates
    tables, formats, chat, prompts, encoder, encoded   rows of data -> conversations -> token ids
    curriculum, sequences, replay            the prompts and the batches of a step
    rollouts, engine, decode, folded, fixed, gap    generation, and the check of what it drew
    loop, losses, objectives, diagnostics, clock    one step: loss, gradient, metrics, seconds
    checkpoint, monitor, tracking        what a resume needs; what is measured and logged on the way
    preflight, agreement, answers         a pair before it is trained; answers for an evaluation

`entrypoints` imports `run`, `preflight`, `pairs`, `prompts`, `hub`, `loading`, `teacher_server`;
`evals` imports `models`, `chat`, `engine`, and `answers`; `sweep` names `pairs`, `run`, and
`teacher_server` as strings only.
"""

import logging

# At its import it warns that faster inference in 4 bits needs another package. We use none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
