package main

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/apimachinery/lease"
	"k8s.io/klog/v2"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/utils/clock"
)

const (
	lookAtDevicesEvery = 200 * time.Millisecond // upstream looks every 10 s
	heartbeatEvery     = 10 * time.Second
	leaseSeconds       = 40
)

// nodeStatus keeps the node's extended resources, its Ready condition and its Lease true.
type nodeStatus struct {
	client  kubernetes.Interface
	name    string
	devices *devicemanager.ManagerImpl

	mutex  sync.Mutex
	cached *v1.Node
}

// resources is what the node says that it has of plugins' resources.
type resources struct {
	Capacity    v1.ResourceList `json:"capacity"`
	Allocatable v1.ResourceList `json:"allocatable"`
}

func newNodeStatus(client kubernetes.Interface, name string, devices *devicemanager.ManagerImpl) *nodeStatus {
	return &nodeStatus{client: client, name: name, devices: devices}
}

// register says that the node is ready. A machine without a checkpoint is a new one: what the node object still
// offers of extended resources is not there until a plugin brings it.
func (n *nodeStatus) register(ctx context.Context, isNew bool) error {
	node, err := n.read(ctx)
	if err != nil {
		return err
	}
	offered := resources{v1.ResourceList{}, v1.ResourceList{}}
	for name := range node.Status.Capacity {
		if isNew && v1helper.IsExtendedResourceName(name) {
			offered.set(name, 0)
		}
	}
	now := metav1.Now()
	return n.patch(ctx, offered, v1.NodeCondition{LastTransitionTime: now, LastHeartbeatTime: now})
}

// keep follows the device manager for as long as the kubelet runs.
func (n *nodeStatus) keep(ctx context.Context) {
	offered, told := resources{v1.ResourceList{}, v1.ResourceList{}}, resources{}
	var toldAt time.Time
	for ; ctx.Err() == nil; sleep(ctx, lookAtDevicesEvery) {
		n.look(ctx, &offered)
		if apiequality.Semantic.DeepEqual(offered, told) && time.Since(toldAt) < heartbeatEvery {
			continue
		}
		if err := n.patch(ctx, offered, v1.NodeCondition{LastHeartbeatTime: metav1.Now()}); err != nil {
			klog.ErrorS(err, "Cannot tell the node's status")
			continue
		}
		told, toldAt = resources{offered.Capacity.DeepCopy(), offered.Allocatable.DeepCopy()}, time.Now()
	}
}

// look keeps resources whose plugin has long gone at nought, so that they are known to be a plugin's.
func (n *nodeStatus) look(ctx context.Context, offered *resources) {
	capacity, allocatable, gone := n.devices.GetCapacity(klog.FromContext(ctx))
	for name := range capacity {
		offered.Capacity[name], offered.Allocatable[name] = capacity[name], allocatable[name]
	}
	for _, name := range gone {
		offered.set(v1.ResourceName(name), 0)
	}
}

func (r *resources) set(name v1.ResourceName, count int64) {
	r.Capacity[name] = *resource.NewQuantity(count, resource.DecimalSI)
	r.Allocatable[name] = *resource.NewQuantity(count, resource.DecimalSI)
}

func (n *nodeStatus) patch(ctx context.Context, offered resources, ready v1.NodeCondition) error {
	ready.Type, ready.Status = v1.NodeReady, v1.ConditionTrue
	ready.Reason, ready.Message = "KubeletReady", "kubelet is posting ready status"
	condition := map[string]any{
		"type": ready.Type, "status": ready.Status, "reason": ready.Reason, "message": ready.Message,
		"lastHeartbeatTime": ready.LastHeartbeatTime,
	}
	if !ready.LastTransitionTime.IsZero() {
		condition["lastTransitionTime"] = ready.LastTransitionTime
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{
		"capacity": offered.Capacity, "allocatable": offered.Allocatable, "conditions": []any{condition},
	}})
	if err != nil {
		return err
	}
	node, err := n.client.CoreV1().Nodes().Patch(
		ctx, n.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return err
	}
	n.remember(node)
	return nil
}

// cachedOrRead is what admission looks at: the node as it last was, or as it is now.
func (n *nodeStatus) cachedOrRead(ctx context.Context, useCache bool) (*v1.Node, error) {
	if !useCache {
		return n.read(ctx)
	}
	n.mutex.Lock()
	defer n.mutex.Unlock()
	return n.cached.DeepCopy(), nil
}

func (n *nodeStatus) read(ctx context.Context) (*v1.Node, error) {
	node, err := n.client.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	n.remember(node)
	return node.DeepCopy(), nil
}

func (n *nodeStatus) remember(node *v1.Node) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	n.cached = node
}

func (n *nodeStatus) keepLease(ctx context.Context) {
	ignore := func() {}
	lease.NewController(
		clock.RealClock{}, n.client, n.name, leaseSeconds, ignore, heartbeatEvery, n.name, v1.NamespaceNodeLease, nil,
	).Run(ctx)
}
