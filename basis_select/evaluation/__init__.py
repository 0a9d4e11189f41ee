"""How good and how fast: lm-eval on a task, programs in a sandbox, paired comparison with the parent, records of both;
speed, bench and profile; figures, HTML and spectra of reports.
"""
