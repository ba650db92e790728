"""What a run leaves behind, and reading it back.

Written: `checkpoint` (the files to go on from; `going_on` says with which settings), `names` of the other
files, `record` (the settings and facts that files keep), `gallery` (the validation pictures), `card`, `hub`.
Read back: `history` (one summary, header or log, whatever is in it) for `reading` (the runs in a folder, as
the page shows them).
"""
