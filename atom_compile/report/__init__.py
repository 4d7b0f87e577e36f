"""What `explain` found, as data (JSON), tables, a page of HTML, and the difference of two.

A report's JSON, all of it plain values; `null` where something is not known:

    format, version     "atom_compile report", 1
    versions            {"atom_compile": ..., "torch": ...}
    scheme              the fields of the `Scheme`
    weight_bytes_before, weight_bytes_after, cache_bytes_per_token
    operators           operator -> how often the final graph calls it
    layers              one object per linear, the fields of `explain.Layer`
    attentions          one object per attention, the fields of `explain.Attention`
    graphs              one object per captured graph:
      nodes               every node that any stage has, once; stages refer to them by position
        name                unique within a stage; the same name in two stages is the same node
        op, operator        FX's kind of node; what it calls: "atom.linear", "mul", ".view"
        target              what it calls, in full
        kind                input, output, weight, untouched, reorder, quantize, int4, fused or
                            attention
        module              where in the model it was computed: "model.layers.0.mlp"
        outputs             [{"dtype": "float32", "shape": ["2", "12", "256"]}], one per tensor
        bytes, operations   of its results; of computing them (see `nodes.operations`)
        inputs              names of the nodes that it reads
        source              {"file", "line", "function", "code"} of the model's code
        linears             parameter names of the linears that it computes
        remarks             what the passes said about it
        reason              why it was left as it was, if the final graph still has it so
      stages              in the order of the pipeline
        stage, why, milliseconds, operators, messages
        nodes               positions in `nodes`, in the order of execution
        added, removed      names of nodes, against the stage before
        changed             names of nodes of which something else than the name differs
        merged              [{"from": names, "into": names}]: removed nodes and what replaced them
"""
