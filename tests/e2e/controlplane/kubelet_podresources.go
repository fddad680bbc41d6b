package main

import (
	"context"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"
	limited "k8s.io/kubernetes/pkg/kubelet/apis/grpc"
	"k8s.io/kubernetes/pkg/kubelet/apis/podresources"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
)

// servePodResources starts upstream's server, with upstream's limit of a hundred calls a second.
func servePodResources(ctx context.Context, k *kubelet) error {
	socket := filepath.Join(kubeletDirectory, "pod-resources", podresources.Socket+".sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	limit := limited.WithRateLimiter(ctx, "podresources", podresources.DefaultQPS, podresources.DefaultBurstTokens)
	providers := podresources.PodResourcesProviders{
		Pods:             k.pods,
		Devices:          givenDevices{k.devices},
		Cpus:             noCPUs{},
		Memory:           noMemory{},
		DynamicResources: noClaims{},
	}
	server := grpc.NewServer(limit)
	api.RegisterPodResourcesListerServer(server, podresources.NewV1PodResourcesServer(ctx, providers))
	go func() {
		klog.ErrorS(server.Serve(listener), "PodResources ended")
	}()
	return nil
}

// givenDevices puts what the device manager says into PodResources' words: one entry for each device and NUMA node.
type givenDevices struct {
	*devicemanager.ManagerImpl
}

func (g givenDevices) GetDevices(podUID, container string) []*api.ContainerDevices {
	return inWords(g.ManagerImpl.GetDevices(podUID, container))
}

func (g givenDevices) GetAllocatableDevices(logger klog.Logger) []*api.ContainerDevices {
	return inWords(g.ManagerImpl.GetAllocatableDevices(logger))
}

func inWords(devices devicemanager.ResourceDeviceInstances) []*api.ContainerDevices {
	var all []*api.ContainerDevices
	for resource, instances := range devices {
		for id, device := range instances {
			if device.GetTopology() == nil {
				all = append(all, &api.ContainerDevices{ResourceName: resource, DeviceIds: []string{id}})
			}
			for _, node := range device.GetTopology().GetNodes() {
				all = append(all, &api.ContainerDevices{
					ResourceName: resource,
					DeviceIds:    []string{id},
					Topology:     &api.TopologyInfo{Nodes: []*api.NUMANode{{ID: node.GetID()}}},
				})
			}
		}
	}
	return all
}

// No CPU manager, memory manager or DRA is played.

type noCPUs struct{}

func (noCPUs) GetCPUs(*v1.Pod, *v1.Container) []int64 { return nil }
func (noCPUs) GetPodCPUs(string) []int64              { return nil }
func (noCPUs) GetAllocatableCPUs() []int64            { return nil }

type noMemory struct{}

func (noMemory) GetMemory(klog.Logger, *v1.Pod, *v1.Container) []*api.ContainerMemory { return nil }
func (noMemory) GetPodMemory(klog.Logger, string) []*api.ContainerMemory              { return nil }
func (noMemory) GetAllocatableMemory(klog.Logger) []*api.ContainerMemory              { return nil }

type noClaims struct{}

func (noClaims) GetDynamicResources(klog.Logger, *v1.Pod, *v1.Container) []*api.DynamicResource {
	return nil
}
