// One binary with the whole control plane in it, so that tests compile and keep one file. Each sub-command is the
// upstream program, unchanged; only etcd's few flags are our own. No decisions here.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

var programs = []struct {
	name    string
	command func() *cobra.Command
}{
	{"etcd", newEtcdCommand},
	{"kube-apiserver", apiserver.NewAPIServerCommand},
	{"kube-controller-manager", manager.NewControllerManagerCommand},
	{"kube-scheduler", func() *cobra.Command { return scheduler.NewSchedulerCommand() }},
	{"kubectl", kubectl.NewDefaultKubectlCommand},
	{"kubelet", newKubeletCommand},
	{"cdi", newCDICommand},
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	for _, program := range programs {
		if program.name == os.Args[1] {
			os.Args = os.Args[1:] // upstream code reads os.Args itself (kubectl plugins, cobra)
			dieWithParent()
			os.Exit(cli.Run(program.command()))
		}
	}
	usage()
}

func usage() {
	var names []string
	for _, program := range programs {
		names = append(names, program.name)
	}
	fmt.Fprintln(os.Stderr, "usage: controlplane", strings.Join(names, "|"), "[flags]")
	os.Exit(2)
}
