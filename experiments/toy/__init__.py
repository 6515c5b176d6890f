"""The paper's two toys: branched one-neuron networks on the line, Figures 1 to 4."""
