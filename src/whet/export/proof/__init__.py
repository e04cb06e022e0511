"""Proof that an exported artifact still says what the tuned model says, loaded by the engine that will run it.

    reference = Reference.of(model, tokenizer, prompts)     the adapter on its base, asked once
    proof = prove_gguf(reference, path, "q4_k_m", merged)   files first, then what llama.cpp answers
    proof.passed, proof.checks

What is compared, in this order: files and types; config, sizes, tokenizer, template (identity.py; folder.py,
gguf_file.py, adapter_file.py); the adapter's share in each layer (share.py); tokens, distributions, greedy answers
(behaviour.py).
"""

from whet.export.proof.checks import Check, Proof
from whet.export.proof.prove import prove_adapter, prove_folder, prove_gguf
from whet.export.proof.reference import Reference

__all__ = ["Check", "Proof", "Reference", "prove_adapter", "prove_folder", "prove_gguf"]
