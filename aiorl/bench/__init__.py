"""What a configuration's parts could do on this machine, each by itself, and what the whole makes of it: ``aiorl bench``.

stepping, costless  what runs in processes of their own: environments without a trainer, and environments without a cost
ceilings            environments, link, inference and learner, each alone
trainer_cost        the trainer's processor time per tick and per row
measuring           everything in turns, in one run
figures             medians, shares, and what the bottleneck is
report              text and JSON
"""
