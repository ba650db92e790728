"""Flat-LoRA itself: noise on the merged weights of LoRA layers while they train.

It needs torch and PEFT alone and works on any model with PEFT's LoRA layers.
"""
