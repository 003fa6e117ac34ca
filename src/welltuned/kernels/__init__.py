"""The arithmetic, each op beside its plain reference. torch only; no model, no file, no configuration.

Shape suffixes used here and above:
    N packed tokens   M labelled rows   I, O inputs and outputs of a projection   H hidden size   V vocabulary
    K adapters        R rank            Q, G query and key/value heads            D head dimension
"""
