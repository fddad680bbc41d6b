// KWOK plays the kubelets of a test cluster. The program is upstream's; this file only starts it, and ends it when the
// process that started it has gone.
package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"sigs.k8s.io/kwok/pkg/config"
	"sigs.k8s.io/kwok/pkg/kwok/cmd"
	"sigs.k8s.io/kwok/pkg/log"
	"sigs.k8s.io/kwok/pkg/utils/signals"
)

func main() {
	dieWithParent()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "kwok:", err)
		os.Exit(1)
	}
}

func run() error {
	// --config and --v are read first, from among flags that are the command's own.
	shared := pflag.NewFlagSet("shared", pflag.ContinueOnError)
	shared.ParseErrorsAllowlist.UnknownFlags = true
	shared.Usage = func() {}

	ctx, _ := log.InitFlags(signals.SetupSignalContext(), shared)
	ctx, err := config.InitFlags(ctx, shared)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	command := cmd.NewCommand(ctx)
	command.PersistentFlags().AddFlagSet(shared)
	return command.ExecuteContext(ctx)
}

// dieWithParent is described in ../controlplane/parent.go; the two modules share nothing, so it is here again.
func dieWithParent() {
	parent, err := strconv.Atoi(os.Getenv("TANGRAM_PARENT_PID"))
	if err != nil {
		return
	}
	go func() {
		for os.Getppid() == parent {
			time.Sleep(200 * time.Millisecond)
		}
		os.Exit(1)
	}()
}
