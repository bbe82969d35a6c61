"""Reward families: one file each, and nothing else. The listing is the registry; the file name is the family's name.

Writing one: a file with ``class Family(RewardFamily)`` (``checkpoints.family``): READS, EXAMPLES, how its checkpoints
are known (ARCHITECTURES, or ``matches``), and ``load(source)``. ``load`` puts together what is common, from
``rewards.checkpoints``:

- ``native.load_body(source)``: transformers' body and the tokenizer, every weight accounted for;
- ``native.load_head(source, head, prefix)``: a head of one's own, its weights by their original names, in float32:
  ``head(hidden: (rows, positions, hidden size), mask: (rows, positions) bool) -> (rows,)``;
- ``native.assemble(source, body, tokenizer, head)``: the reward model, with batches, padding, memory and caching. A
  family gives its own ``template`` (Jinja, BOS included), ``trailing_ids``, ``positions_of(ids)`` (the positions whose
  hidden states the head gets; the last token otherwise) or a ``renderer_class``.

The module's text gives the source, the formula, and where we differ from the authors' code.
"""
