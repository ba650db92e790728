"""Flat-LoRA itself: noise on the merged weights of LoRA layers while they train.

It needs torch and PEFT alone and works on any model with PEFT's LoRA layers. `flat_lora` is the object that
users hold, `hooks` the places where the noise hangs, `layer` one LoRA layer of a kind in `supported`. `fused`
computes a plain one as one operation (`branch` says which is plain), `noisy_base` the base of any other.
`prepare` does once a step what all layers need (`row_norms`, `noise`).
"""
