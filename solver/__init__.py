"""Where GPU and MIG demands go: a pure library, exact and checked.

    Node + taken ──read──▶ Room ──▶ states (Whole, Cut) ──steps──▶ Step ──goals──▶ price      (one definition)
                                                                                    │
          one pod, now:            Ranking.put / prices / best / refusal  ◀─────────┤
          all that is pending:     solve(Problem) ──▶ Plan                ◀─────────┘
          afterwards:              verify(Problem, Plan) ──▶ what is wrong with it (nothing)

Standard library, numpy and OR-Tools only. No I/O, no clock, no Kubernetes.
"""
