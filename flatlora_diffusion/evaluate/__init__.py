"""What an adapter changes, in figures: personalisation, retention, flatness, sharpness, trade-off.

`command` and `request` turn flags into a `plan`; `evaluation` measures it part by part, and `kept` keeps each
on disk. Measures: `denoising` (losses), `drawn` with `likeness` (pictures), `flatness`, on `merged` weights.
The `report` is shown by `tables` and by `plots`, which look as `figures` says.
"""
