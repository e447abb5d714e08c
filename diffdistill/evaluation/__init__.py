"""What a generator's samples are worth: distances to the data, fidelity and coverage, memorisation, label agreement.

`metrics.measure` is the entry; its numbers travel with the `protocol.Protocol` they were taken under.
"""
