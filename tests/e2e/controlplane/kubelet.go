package main

import (
	"context"
	"os/signal"
	"syscall"
	"time"

	cadvisorapi "github.com/google/cadvisor/lib/model"
	"github.com/spf13/cobra"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	corev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/allocation"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/kubernetes/pkg/kubelet/cm/topologymanager"
	"k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
)

// What a kubelet does with devices, without its containers: upstream's device manager, topology manager, admission
// and PodResources server, around a loop of our own that plays pods' lives against the real API server.
//
//	API server ── watch ──▶ arrivals ──▶ admission (one by one) ──▶ a life for each pod ──▶ containers.jsonl
//	     ▲                               │  topology manager          (started, ended)
//	     │                               │  device manager ◀── plugins
//	     └─── status of pods and node ◀──┘  predicates
//
// Run it in a mount namespace of its own: upstream's code knows /var/lib/kubelet only.

const kubeletDirectory = "/var/lib/kubelet"

type kubeletOptions struct {
	node, kubeconfig, out string
	policy, scope         string
	numaNodes             int
	longestDelay          time.Duration
	endWithin             time.Duration
	seed                  int64
}

type kubelet struct {
	options    kubeletOptions
	client     kubernetes.Interface
	devices    *devicemanager.ManagerImpl
	topology   topologymanager.Manager
	allocation allocation.Manager
	sources    config.SourcesReady
	node       *nodeStatus
	pods       *podTable
	containers *containerLog
	recorder   record.EventRecorder
	chance     *chance
}

func newKubeletCommand() *cobra.Command {
	var options kubeletOptions
	command := &cobra.Command{
		Use:          "kubelet",
		SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error {
			ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
			defer cancel()
			return runKubelet(ctx, options)
		},
	}
	flags := command.Flags()
	flags.StringVar(&options.node, "node", "", "name of the node; it must exist")
	flags.StringVar(&options.kubeconfig, "kubeconfig", "", "how to reach the API server")
	flags.StringVar(&options.out, "out", "", "directory for containers.jsonl")
	flags.StringVar(&options.policy, "topology-policy", topologymanager.PolicyNone, "the topology manager's policy")
	flags.StringVar(&options.scope, "topology-scope", topologymanager.ContainerTopologyScope, "container or pod")
	flags.IntVar(&options.numaNodes, "numa-nodes", 2, "NUMA nodes of the machine that is played")
	flags.DurationVar(&options.longestDelay, "longest-delay", 300*time.Millisecond, "before a pod is admitted")
	flags.DurationVar(&options.endWithin, "end-within", 500*time.Millisecond, "the longest that containers take to end")
	flags.Int64Var(&options.seed, "seed", 1, "of delays and of the order of admission")
	for _, name := range []string{"node", "kubeconfig", "out"} {
		_ = command.MarkFlagRequired(name)
	}
	return command
}

func runKubelet(ctx context.Context, options kubeletOptions) error {
	k, err := newKubelet(ctx, options)
	if err != nil {
		return err
	}
	logger := klog.FromContext(ctx)
	if err := k.node.register(ctx, k.devices.ShouldResetExtendedResourceCapacity()); err != nil {
		return err
	}
	known, running := k.containers.known()
	if err := k.devices.Start(logger, k.pods.GetActivePods, k.sources, known, running); err != nil {
		return err
	}
	if err := servePodResources(ctx, k); err != nil {
		return err
	}
	go k.node.keepLease(ctx)
	go k.node.keep(ctx)
	go k.forgetHealthUpdates(ctx)
	return k.syncLoop(ctx)
}

func newKubelet(ctx context.Context, options kubeletOptions) (*kubelet, error) {
	logger := klog.FromContext(ctx)
	client, err := connect(options.kubeconfig)
	if err != nil {
		return nil, err
	}
	containers, err := openContainerLog(options.out)
	if err != nil {
		return nil, err
	}
	k := &kubelet{
		options:    options,
		client:     client,
		pods:       newPodTable(),
		containers: containers,
		recorder:   newRecorder(ctx, client, options.node),
		chance:     newChance(options.seed),
	}
	// Upstream asks the same of its sources of pods: has the first list of each come in?
	k.sources = config.NewSourcesReady(func(seen sets.Set[string]) bool { return seen.Has(apiSource) })
	numa := numaNodes(options.numaNodes)
	if k.topology, err = topologymanager.NewManager(logger, numa, options.policy, options.scope, nil); err != nil {
		return nil, err
	}
	if k.devices, err = devicemanager.NewManagerImpl(logger, numa, k.topology); err != nil {
		return nil, err
	}
	k.topology.AddHintProvider(logger, k.devices)
	k.node = newNodeStatus(client, options.node, k.devices)
	k.allocation = allocation.NewManager(
		kubeletDirectory, nil, func(context.Context, *v1.Pod) {}, k.pods.GetActivePods, k.pods.byUID, k.sources, nil, logger)
	k.allocation.AddPodAdmitHandlers(k.admitHandlers())
	return k, nil
}

// admitHandlers are those of the real kubelet that have to do with devices, in its order: devices are given before
// the predicates are asked, and are taken back later when these refuse.
func (k *kubelet) admitHandlers() lifecycle.PodAdmitHandlers {
	predicates := lifecycle.NewPredicateAdmitHandler(
		k.node.cachedOrRead, lifecycle.NewAdmissionFailureHandlerStub(), k.devices.UpdatePluginResources)
	return lifecycle.PodAdmitHandlers{k.topology, predicates}
}

// forgetHealthUpdates empties a channel that would otherwise fill up; pods' statuses do not say devices' health here.
func (k *kubelet) forgetHealthUpdates(ctx context.Context) {
	for {
		select {
		case <-k.devices.Updates():
		case <-ctx.Done():
			return
		}
	}
}

func connect(kubeconfig string) (kubernetes.Interface, error) {
	loaded, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	loaded.QPS, loaded.Burst = 200, 400
	return kubernetes.NewForConfig(loaded)
}

func newRecorder(ctx context.Context, client kubernetes.Interface, node string) record.EventRecorder {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&corev1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	return broadcaster.NewRecorder(scheme.Scheme, v1.EventSource{Component: "kubelet", Host: node})
}

func numaNodes(count int) []cadvisorapi.Node {
	nodes := make([]cadvisorapi.Node, count)
	for index := range nodes {
		nodes[index].Id = index
	}
	return nodes
}
