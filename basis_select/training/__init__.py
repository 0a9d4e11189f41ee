"""What tune, learn and heal share: batches, losses, soft labels, the loop, optimizers in bfloat16 (collage.py) and what
a step costs; spread.py trains a rounded model on several processes.
"""
