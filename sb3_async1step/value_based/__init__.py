"""What the value-based methods share: epsilon-greedy acting, the target network, TD losses and DQN's policies."""
